"""Count what Lightning does in a training to the sections of a search's profile."""

from __future__ import annotations

from lightning.pytorch.profilers import Profiler

from autopeft.core.profiling import Profile, current_profile

# By the end of an action's name; the first that fits. Closures run inside the optimizer's step: a section is
# only given the time that none inside it takes.
_ENDINGS = {
    "run_training_epoch": "trainer",
    "run_training_batch": "trainer",
    ".training_step": "forward",
    ".backward": "backward",
    ".optimizer_step": "optimizer",
    ".optimizer_zero_grad": "optimizer",
    ".configure_gradient_clipping": "optimizer",
    ".lr_scheduler_step": "optimizer",
    ".train_dataloader_next": "data",
    ".val_next": "evaluate",
    ".batch_to_device": "data",
}


def section_of(action: str) -> str | None:
    """Return the section that an action of Lightning's belongs to; None where it counts to what calls it."""
    if "validation" in action:
        return "evaluate"
    return next((name for ending, name in _ENDINGS.items() if action.endswith(ending)), None)


class SectionProfiler(Profiler):
    """Lightning's profiler interface on a profile."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self._profile = profile
        self._depths: dict[str, int] = {}

    def start(self, action_name: str) -> None:
        """Enter an action's section."""
        if name := section_of(action_name):
            self._depths[action_name] = self._profile.enter(name)

    def stop(self, action_name: str) -> None:
        """Leave it; actions inside it that an exception left open are ended with it."""
        if action_name in self._depths:
            self._profile.leave(self._depths.pop(action_name))


def training_profiler() -> SectionProfiler | None:
    """Return the Trainer's profiler while a profile is running; None makes it use none."""
    profile = current_profile.get()
    return None if profile is None else SectionProfiler(profile)
