"""The card of a model: what it says of settings and error rates."""

from typing import Any

from cel_dist.config_file import parse_config
from cel_dist.description import BackEndDescription, EncoderDescription, ModelDescription, Provenance
from cel_dist.model_card import model_card


def described(settings: dict[str, Any], **values: Any) -> ModelDescription:
    training = Provenance(config=parse_config(settings, "test").model_dump(mode="json"), metrics={"eer": 0.1})
    encoder = EncoderDescription(name="fast_resnet34", embedding_dim=16)
    return ModelDescription(encoder=encoder, training=training, **values)


def test_a_card_lists_the_settings_that_repeat_the_training() -> None:
    def listed(settings: dict[str, Any]) -> list[str]:
        return [line.strip() for line in model_card(described(settings), "cel").splitlines() if line.startswith("    ")]

    # Profile 3 is the default, though no configuration without a bank has it.
    assert listed({"data": {"shards": "s", "bank": "b"}}) == ["data.shards=s", "data.bank=b"]
    changed = {"data": {"shards": "s"}, "augment": {"profile": 0, "speeds": [0.9, 1.1]}, "eval": {"at_start": False}}
    assert listed(changed) == [
        "data.shards=s",
        "augment.profile=0",
        "augment.speeds=[0.9, 1.1]",
        "eval.at_start=false",
    ]


def test_a_card_does_not_pass_off_error_rates_as_those_of_a_later_back_end() -> None:
    settings = {"data": {"shards": "s", "bank": "b"}}
    assert "without mean and norm" not in model_card(described(settings), "cel")
    back_end = BackEndDescription(score_norm="as", cohort="cohort.txt")
    card = model_card(described(settings, back_end=back_end), "cel")
    assert "; as-norm (cohort cohort.txt)" in card
    assert "embeddings as they are, without mean and norm of the cohort" in card
