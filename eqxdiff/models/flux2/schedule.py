"""The noise levels of FLUX.2."""


def compute_empirical_mu(sequence_length: int, steps: int) -> float:
    """Returns the logarithm of the schedule's shift, fitted to good pictures.

    It is linear in the number of patches, by one line for 10 steps and another for 200; between
    and beyond it is linear in the number of steps. Pictures above 4,300 patches have the second.

    Source: `compute_empirical_mu` of https://github.com/black-forest-labs/flux2 and of diffusers.
    """
    few = 8.73809524e-05 * sequence_length + 1.89833333
    many = 0.00016927 * sequence_length + 0.45666666
    if sequence_length > 4300:
        return many
    slope = (many - few) / 190.0
    return slope * steps + (many - 200.0 * slope)
