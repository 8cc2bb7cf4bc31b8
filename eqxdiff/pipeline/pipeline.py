"""The loaded model: a PyTree."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx

from .._errors import SettingError
from .blueprint import Blueprint
from .texts import Encoded, encode_prompts


class Pipeline(eqx.Module):
    """A loaded model: a PyTree of its components. Edit one with `eqx.tree_at`.

    **Fields:**

    - `components`: the modules by name, such as `pipe.components["transformer"]`. A call needs
        those of its stages; others may be absent.
    - `blueprint`: the rest: configs, tokenizers, dtypes, where the weights came from.
    """

    components: dict[str, Any]
    blueprint: Blueprint = eqx.field(static=True)

    def __getitem__(self, name: str) -> Any:
        """Returns a component. **Raises:** `SettingError` where it is not loaded."""
        if name not in self.components:
            raise SettingError(f"This needs the component {name}, which is not loaded.")
        return self.components[name]

    def stage(self, stage: str) -> dict[str, Any]:
        """Returns the components of a stage. **Raises:** `SettingError` where one is missing."""
        return {name: self[name] for name in self.blueprint.names(stage)}

    def without(self, stage: str) -> "Pipeline":
        """Returns the pipeline without the components of a stage, to free their memory.

        **Raises:** `SettingError` where there is no such stage.
        """
        gone = self.blueprint.names(stage)
        if not gone:
            raise SettingError(f"There is no stage {stage!r}: there are text, denoiser and vae.")
        kept = {name: part for name, part in self.components.items() if name not in gone}
        return Pipeline(kept, self.blueprint)

    def adding(self, components: Mapping[str, Any]) -> "Pipeline":
        """Returns the pipeline with more components, or with others in place of its own."""
        return Pipeline({**self.components, **components}, self.blueprint)

    def encode(self, prompts: str | Sequence[str], **given: Any) -> Encoded:
        """Runs the text encoders alone, so that they can be dropped afterwards.

        **Arguments:**

        - `given`: settings. The second and negative prompts, the guidance, `clip_skip` and
            `max_sequence_length` matter here; the others may be given too.

        **Raises:** `SettingError` where an encoder is not loaded; `PromptError`.
        """
        settings = self.blueprint.resolve(given)
        prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        return encode_prompts(self.blueprint, self.stage("text"), prompts, settings)
