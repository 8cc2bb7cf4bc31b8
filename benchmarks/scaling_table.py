"""Writes what `eqxdiff plan` says of FLUX.1 [dev] and SDXL on TPUs, for every way to spread them.

    python benchmarks/scaling_table.py

All figures are static: by the formula of the plan, at the peaks of the chips. The table goes to
`benchmarks/results/scaling_table.md`, beside the times that MaxDiffusion publishes.
"""

from pathlib import Path

from eqxdiff import SettingError
from eqxdiff.plan import Choice, Skeletons, find_target, make_plan, spell_mesh


RESULTS = Path(__file__).parent / "results" / "scaling_table.md"
STEPS = {"flux-dev": 28, "sdxl": 20}
TARGETS = ("v6e-1", "v6e-4", "v6e-8", "v5e-4", "v5e-8")
AXES = ("data", "fsdp", "context", "tensor")
HEAD = (
    "| model | target | mesh | pictures | GiB a device | fits | GB received a step | step, ms | "
    "batch, s | pictures a second |\n|---|---|---|---|---|---|---|---|---|---|"
)
PUBLISHED = """
MaxDiffusion's README: FLUX-dev on v6e-4, 28 steps, 4 pictures, 5.5 s; on v6e-8, 50 steps, 7.78 s.
The sdxl_jax blog of Hugging Face: SDXL on v5e-4, 20 steps, 4 pictures, 2.33 s. These are measured;
the figures above are the least time that the peaks allow.
"""


def rows(model: str) -> list[str]:
    """Returns the lines of a model."""
    skeletons = Skeletons.published(model, dtype="bfloat16", compute_dtype="bfloat16")
    lines = []
    for name in TARGETS:
        target = find_target(name)
        ways = [{axis: target.devices} for axis in AXES] if target.devices > 1 else [{}]
        for mesh in ways:
            choice = Choice({"steps": STEPS[model]}, None, mesh, "nowhere")
            try:
                plan = make_plan(skeletons, target, choice)
            except SettingError as error:
                reason = str(error).replace("`", "")
                lines.append(f"| {model} | {name} | {spell_mesh(mesh)} | {reason} | | | | | | |")
                continue
            step, pictures = plan.program("step"), plan.choice.pictures
            lines.append(
                f"| {model} | {name} | {spell_mesh(mesh)} | {pictures} | {plan.peak / 2**30:.1f} | "
                f"{'yes' if plan.fits else 'no'} | {step.collective / 1e9:.2f} | "
                f"{1e3 * step.seconds:.1f} ({step.bound}) | {plan.seconds:.2f} | "
                f"{pictures / plan.seconds:.2f} |"
            )
    return lines


def main() -> None:
    lines = [line for model in STEPS for line in rows(model)]
    title = "# Static cost of FLUX.1 [dev] (28 steps) and SDXL (20 steps) at 1024x1024 on TPUs\n\n"
    how = "By `python benchmarks/scaling_table.py`; bfloat16, text encoders dropped after use.\n\n"
    RESULTS.write_text(title + how + "\n".join([HEAD, *lines]) + "\n" + PUBLISHED)
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
