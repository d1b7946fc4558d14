"""The configuration of a run: typed, checked, and the only description of what can be set.

A YAML file holds what differs from the defaults (`config_file`). The sections with their descriptions are in
`config_sections`; combinations that cannot work are refused here.
"""

import difflib
import math

from pydantic import model_validator

from cel_dist import plugins
from cel_dist.config_sections import (
    CLASSIFIERS,
    SIMILARITIES,
    AugmentSection,
    CheckpointSection,
    DataSection,
    EncoderSection,
    EngineSection,
    EvalSection,
    FeaturesSection,
    HeadSection,
    LabelsSection,
    LossSection,
    OptimSection,
    RunSection,
    Section,
    TrackingSection,
    TrainSection,
)

# Of the losses that classify, what of the section `head` each of them takes: the other settings are those of its paper.
_HEAD_SETTINGS = {
    "softmax": ("weights", "init"),
    "adacos": ("weights", "init"),
    "cosface": tuple(HeadSection.model_fields),
    "arcface": tuple(HeadSection.model_fields),
}


class Config(Section):
    """The whole configuration of a run."""

    run: RunSection = RunSection()
    data: DataSection
    augment: AugmentSection = AugmentSection()
    features: FeaturesSection = FeaturesSection()
    encoder: EncoderSection = EncoderSection()
    labels: LabelsSection = LabelsSection()
    loss: LossSection = LossSection()
    head: HeadSection = HeadSection()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def check_combinations(self) -> "Config":
        """Refuse what cannot work together, naming the field to change."""
        self._find_plugins()
        if self.augment.profile > 0 and self.data.bank is None:
            raise ValueError(
                f"augment.profile={self.augment.profile} needs data.bank; write one with 'cel prepare SRC --bank --out "
                "BANK' or set augment.profile=0"
            )
        for name in ("noise_snr_db", "speech_snr_db", "music_snr_db", "rir_gain_db"):
            low, high = getattr(self.augment, name)
            if low > high:
                raise ValueError(f"augment.{name}=({low}, {high}) is empty; write the lower bound first")
        self._check_augmentation()
        if self.loss.lambda_s == 0 and self.loss.lambda_u == 0:
            raise ValueError("loss.lambda_s and loss.lambda_u are both 0, so nothing is learned; raise one of them")
        if self.optim.min_lr > self.optim.lr:
            raise ValueError(f"optim.min_lr={self.optim.min_lr} is above optim.lr={self.optim.lr}; lower it")
        if (self.eval.trials is None) != (self.eval.root is None):
            raise ValueError("eval.trials and eval.root go together; set both or neither")
        if self.eval.metadata is not None and self.eval.trials is None:
            raise ValueError("eval.metadata describes the utterances of eval.trials; set that, too, or leave both out")
        self._check_labels()
        return self

    def _find_plugins(self) -> None:
        plugins.load_plugins(self.run.plugins)
        losses = [*dict.fromkeys([*SIMILARITIES, *CLASSIFIERS, *plugins.SIMILARITIES.names()])]
        _require_known("loss.similarity", self.loss.similarity, losses)
        for name in self.augment.extra:
            _require_known("augment.extra", name, plugins.AUGMENTATIONS.names())

    def _check_labels(self) -> None:
        similarity, labels, head = self.loss.similarity, self.labels, self.head
        if not labels.use:
            if self.classifies:
                raise ValueError(
                    f"loss.similarity={similarity} classifies speakers, which needs labels; set labels.use=true, or "
                    "another loss"
                )
            if labels != LabelsSection():
                raise ValueError("the section labels has settings, but labels.use is false; set it to true")
        elif self.train.batch_size % labels.utterances:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} does not divide by labels.utterances={labels.utterances}; a "
                "batch has as many utterances of every speaker"
            )
        elif self.rows < 2:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} with labels.utterances={labels.utterances} is one "
                "speaker, who has nobody to be told from; raise the former"
            )
        elif similarity == "angular_contrastive" and labels.utterances != 2:
            raise ValueError(
                f"loss.similarity={similarity} compares two utterances of a speaker; set labels.utterances=2"
            )
        elif not self.classifies and labels.utterances < 2:
            raise ValueError(
                f"loss.similarity={similarity} compares utterances of a speaker; set labels.utterances to 2 or more"
            )
        for name, value in head:
            if name not in _HEAD_SETTINGS.get(similarity, ()) and value != getattr(HeadSection(), name):
                raise ValueError(f"head.{name}={value} is not used with loss.similarity={similarity}; leave it out")
        if labels.speeds_are_speakers and not self.classifies:
            raise ValueError(
                f"labels.speeds_are_speakers=true is not used with loss.similarity={similarity}, which has no classes; "
                "leave it out"
            )
        if labels.speeds_are_speakers and len(self.augment.speeds) < 2:
            raise ValueError(
                "labels.speeds_are_speakers=true needs two or more of "
                f"augment.speeds={list(self.augment.speeds)}; name them, or leave it out"
            )
        if self.classifies and self.loss.lambda_s == 0:
            raise ValueError(
                f"loss.lambda_s=0 leaves the class weights as they are drawn with loss.similarity={similarity}; raise "
                "it, or take another loss"
            )
        if self.optim.head_lr is not None and similarity == "prototypical":
            raise ValueError(
                f"optim.head_lr={self.optim.head_lr} is not used with loss.similarity={similarity}, which learns "
                "nothing itself; leave it out"
            )
        if similarity == "arcface" and head.margin >= math.pi / 2:
            raise ValueError(f"head.margin={head.margin} is an angle; arcface takes less than {math.pi / 2:.2f}")
        if head.margin_from_epoch > head.margin_until_epoch:
            raise ValueError(
                f"head.margin_from_epoch={head.margin_from_epoch} is after head.margin_until_epoch="
                f"{head.margin_until_epoch}; raise the latter"
            )

    @property
    def classifies(self) -> bool:
        """Whether the loss has class weights."""
        return self.loss.similarity in _HEAD_SETTINGS

    @property
    def has_margin(self) -> bool:
        """Whether the loss has a margin."""
        return "margin" in _HEAD_SETTINGS.get(self.loss.similarity, ())

    @property
    def rows(self) -> int:
        """Rows of the global batch: utterances, or with labels speakers."""
        return self.train.batch_size // self.labels.utterances if self.labels.use else self.train.batch_size

    def _check_augmentation(self) -> None:
        speeds = self.augment.speeds
        hundredths = [round(100 * speed) for speed in speeds]
        if any(abs(100 * speed - whole) > 1e-6 for speed, whole in zip(speeds, hundredths, strict=True)):
            raise ValueError(f"augment.speeds={list(speeds)}: a speed has two decimals at most, such as 0.9 or 1.05")
        if len(set(hundredths)) < len(hundredths):
            raise ValueError(f"augment.speeds={list(speeds)} has a speed twice; all are drawn alike, so name each once")
        for masks, width, available, whole in (
            ("time_masks", "time_mask_frames", self.data.segment_frames, "data.segment_frames"),
            ("freq_masks", "freq_mask_bands", self.features.num_mels, "features.num_mels"),
        ):
            number, widest = getattr(self.augment, masks), getattr(self.augment, width)
            if number * widest >= available:
                raise ValueError(
                    f"augment.{masks}={number} of up to augment.{width}={widest} may leave nothing of "
                    f"{whole}={available}; lower one of them"
                )

    @property
    def segment_samples(self) -> int:
        """Samples T of a segment: hop 160 a frame, and 240 for the rest of the last window."""
        return self.data.segment_frames * 160 + 240

    @property
    def read_samples(self) -> int:
        """Samples of a segment as it is read: so many that T are left at the highest of `augment.speeds`."""
        return -(-self.segment_samples * max(round(100 * speed) for speed in self.augment.speeds) // 100)


def _require_known(path: str, name: str, known: list[str]) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        known_ones = f"did you mean '{nearest[0]}'? Known: {', '.join(known)}" if nearest else "none is known"
        raise ValueError(f"'{path}': there is nothing called '{name}'; {known_ones}, and run.plugins may name more")
