"""The scheduler configs that diffusers' results were recorded for: name -> fields, and so on."""

FLOW = {
    "static": {"shift": 3.0},
    "unshifted": {"shift": 1.0},
    "dynamic": {"shift": 3.0, "use_dynamic_shifting": True},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "narrow": {
        "use_dynamic_shifting": True,
        "base_shift": 0.4,
        "max_shift": 1.3,
        "base_image_seq_len": 128,
        "max_image_seq_len": 2048,
    },
    "terminal": {"shift": 2.0, "shift_terminal": 0.1},
    "karras": {"shift": 2.0, "use_karras_sigmas": True},
    "exponential": {"shift": 2.0, "use_exponential_sigmas": True},
    "beta": {"shift": 2.0, "use_beta_sigmas": True},
}

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "trained_betas": None,
}
LEADING = {"timestep_spacing": "leading"}
TRAILING = {"timestep_spacing": "trailing"}
LINSPACE = {"timestep_spacing": "linspace"}
KARRAS = {"use_karras_sigmas": True}
EXPONENTIAL = {"use_exponential_sigmas": True}
BETA = {"use_beta_sigmas": True}
V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
ZERO_SNR = {"rescale_betas_zero_snr": True, **TRAILING, **V}
TO_MIN = {"final_sigmas_type": "sigma_min"}
NO_CLIP = {"clip_sample": False}


def _cases():
    """name -> (class, fields, steps, arguments of each step)."""
    out = {}

    def case(name, scheduler, *fields, steps=20, **kwargs):
        merged = {**STABLE_DIFFUSION}
        for more in fields:
            merged |= more
        out[name] = (scheduler, merged, steps, kwargs)

    def several(name, scheduler, *more):
        case(f"{name}/leading", scheduler, LEADING, *more)
        case(f"{name}/trailing v", scheduler, TRAILING, V, *more, steps=10)

    several("ddim", "DDIMScheduler", NO_CLIP)
    case("ddim/to level 0", "DDIMScheduler", NO_CLIP, {"set_alpha_to_one": False})
    case("ddim/zero snr", "DDIMScheduler", NO_CLIP, ZERO_SNR, steps=5)
    case("ddim/eta", "DDIMScheduler", NO_CLIP, LEADING, eta=0.7)
    case("ddim/eta zero snr", "DDIMScheduler", NO_CLIP, ZERO_SNR, steps=5, eta=1.0)
    case("ddim/x0", "DDIMScheduler", NO_CLIP, LEADING, X0)
    case("ddim/linear", "DDIMScheduler", NO_CLIP, {"beta_schedule": "linear"}, steps=10)
    cosine = {"beta_schedule": "squaredcos_cap_v2"}
    case("ddim/cosine", "DDIMScheduler", NO_CLIP, cosine, V)
    case(
        "ddim/cosine from the capped level", "DDIMScheduler", NO_CLIP, cosine, V, TRAILING, steps=5
    )
    several("ddpm", "DDPMScheduler", NO_CLIP)
    case("ddpm/linspace", "DDPMScheduler", NO_CLIP, LINSPACE, steps=13)
    several("pndm", "PNDMScheduler", {"skip_prk_steps": True}, {"prediction_type": "epsilon"})
    case("pndm/to clean", "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True})
    case("pndm/2 steps", "PNDMScheduler", {"skip_prk_steps": True}, steps=2)
    case("pndm/1 step", "PNDMScheduler", {"skip_prk_steps": True}, steps=1)
    for name, scheduler in [
        ("euler", "EulerDiscreteScheduler"),
        ("euler-ancestral", "EulerAncestralDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("lms", "LMSDiscreteScheduler"),
        ("dpmpp-2m", "DPMSolverMultistepScheduler"),
        ("dpmpp-sde", "DPMSolverSDEScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
    ]:
        several(name, scheduler)
        case(f"{name}/default spacing", scheduler, steps=7)
        if name != "euler-ancestral":
            case(f"{name}/karras", scheduler, LEADING, KARRAS, steps=12)
            case(f"{name}/exponential v", scheduler, EXPONENTIAL, V, steps=12)
            case(f"{name}/beta", scheduler, LEADING, BETA, steps=12)
        if name in ("euler", "euler-ancestral", "dpmpp-2m", "unipc"):
            case(f"{name}/zero snr", scheduler, ZERO_SNR, steps=10)
        if name in ("euler", "dpmpp-2m", "unipc"):
            case(f"{name}/to the smallest", scheduler, LEADING, TO_MIN, steps=20)
            case(f"{name}/few to the smallest", scheduler, LEADING, TO_MIN, steps=8)
        if name in ("euler", "dpmpp-2m", "unipc", "heun", "lms"):
            case(f"{name}/x0", scheduler, LEADING, X0, steps=9)
    case("euler/1 step", "EulerDiscreteScheduler", TRAILING, steps=1)
    case("euler/lightning", "EulerDiscreteScheduler", TRAILING, {"clip_sample": False}, steps=4)
    sde = {"algorithm_type": "sde-dpmsolver++"}
    several("dpmpp-2m-sde", "DPMSolverMultistepScheduler", sde)
    case("dpmpp-2m-sde/karras", "DPMSolverMultistepScheduler", sde, KARRAS, steps=18)
    for name, scheduler in [("lcm", "LCMScheduler"), ("tcd", "TCDScheduler")]:
        case(f"{name}/4 steps", scheduler, steps=4)
        case(f"{name}/7 steps v", scheduler, V, steps=7)
        case(f"{name}/1 step", scheduler, steps=1)
        case(f"{name}/of 20", scheduler, {"original_inference_steps": 20}, steps=3)
    case("tcd/gamma half", "TCDScheduler", steps=6, eta=0.5)
    case("tcd/gamma 0", "TCDScheduler", steps=6, eta=0.0)
    case("tcd/gamma 1", "TCDScheduler", steps=6, eta=1.0)
    return out


DISCRETE = _cases()
