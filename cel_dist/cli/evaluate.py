"""`cel evaluate`, `cel embed`, `cel verify`, `cel import-published`: using a trained model."""

import logging
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cel_dist.cli.app import JsonOption, app, emit, suggest
from cel_dist.cli.progress import progress_bar

if TYPE_CHECKING:
    from cel_dist.evaluation import Evaluation
    from cel_dist.evaluation.trials import Trials

logger = logging.getLogger(__name__)

ModelOption = Annotated[
    str,
    typer.Option(
        help="Run, checkpoint or model folder, published .model file, or MLflow URI such as models:/cel@champion."
    ),
]

NO_THRESHOLD = (
    "This model has no threshold, so there is no decision. Measure one with 'cel evaluate --model MODEL --trials FILE "
    "--root DIR --calibrate OUT', then use '--model OUT'."
)


@app.command(
    epilog="Example: cel evaluate --model runs/cel --trials corpus/trials.txt --root corpus --out runs/cel/test"
)
def evaluate(
    model: ModelOption,
    root: Annotated[
        Path, typer.Option(help="Folder to which the paths in the lists are relative; the corpus of a --protocol.")
    ],
    trials: Annotated[
        Path | None,
        typer.Option(help="Trials file: lines 'label enrol test' (1 or 0), or 'enrol test target|nontarget'."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Public evaluation whose lists are found below --root, such as voxceleb1-o-cleaned, voices2019-dev or "
            "sitw-eval-core-core; any other name lists all.",
        ),
    ] = None,
    enrol: Annotated[
        Path | None,
        typer.Option(
            help="List of models, which the trials then name instead of enrolment files: lines 'model file', or 'model "
            "file start end' in seconds. A model on several lines is the mean of them."
        ),
    ] = None,
    frames: Annotated[
        int, typer.Option(help="0 scores whole utterances; else windows of so many frames of 10 ms, 16 or more.")
    ] = 0,
    windows: Annotated[int, typer.Option(help="Windows an utterance; only with --frames.")] = 10,
    windows_as: Annotated[
        str,
        typer.Option(
            metavar="scores|embedding",
            help="Whether a trial has the mean score of its pairs of windows, or an utterance the mean of its windows.",
        ),
    ] = "scores",
    segment_seconds: Annotated[
        float,
        typer.Option(help="Longer utterances are the mean of segments of so many seconds; without --frames."),
    ] = 120.0,
    batch_seconds: Annotated[
        float,
        typer.Option(help="Seconds of audio in the encoder at once, all passes together."),
    ] = 120.0,
    scoring: Annotated[
        Literal["euclidean", "cosine"] | None,
        typer.Option(help="How two embeddings are compared: minus their Euclidean distance, or their cosine."),
    ] = None,
    score_norm: Annotated[
        Literal["z", "t", "s", "as"] | None,
        typer.Option(help="Normalise scores by those against --cohort: z-, t-, s- or adaptive s-norm."),
    ] = None,
    cohort: Annotated[
        Path | None,
        typer.Option(help="Utterances of other speakers: lines 'path', or 'path speaker' to average each speaker."),
    ] = None,
    cohort_root: Annotated[
        Path | None, typer.Option(help="Folder to which the paths in --cohort are relative.", show_default="--root")
    ] = None,
    top_n: Annotated[
        int, typer.Option(help="Most similar cohort entries that the adaptive s-norm looks at; 2 or more.")
    ] = 300,
    subtract_mean: Annotated[
        bool, typer.Option("--subtract-mean", help="Take the mean of the cohort off all embeddings.")
    ] = False,
    quality: Annotated[
        Literal["duration"] | None,
        typer.Option(help="What the calibration knows besides the score: how long the shorter utterance is."),
    ] = None,
    priors: Annotated[
        str, typer.Option(help="Prior probabilities of a target trial, for minDCF and actDCF: 0.01,0.05.")
    ] = "0.01,0.05",
    bootstrap: Annotated[
        int, typer.Option(help="Draw the speakers so many times, 100 or more, for 95 % intervals; 0 for none.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of --bootstrap.")] = 0,
    speakers: Annotated[
        Path | None,
        typer.Option(
            help="Who speaks, for --bootstrap: lines 'path speaker'.", show_default="first folder of the path"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for scores.txt, det.tsv, det.png and scores.png.",
            show_default="evaluation/TRIALS or /PROTOCOL",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write the model, with back end, threshold and calibration from these trials, to DIR.",
        ),
    ] = None,
    metadata: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Show errors by sex, session, duration and age, and how the embeddings lie. A table with tabs and a "
            "header of 'path' and any of speaker, session, sex, seconds, age; or lines 'path speaker'.",
        ),
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Score the same trials from the quietest tenth of the frames, too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a model on a list of trials: equal error rate, minimum detection cost, scores and plots."""
    from cel_dist.data.files import require_folder_or_nothing
    from cel_dist.errors import CelError
    from cel_dist.evaluation import BackEndSettings, BootstrapSettings, diagnose, score_without_voice
    from cel_dist.evaluation import evaluate as run_evaluation
    from cel_dist.evaluation.cutting import WHOLE, Cutting
    from cel_dist.evaluation.metadata import Metadata
    from cel_dist.model import load_model
    from cel_dist.model_folder import refuse_other_content

    cutting = Cutting(frames, windows, windows_as, segment_seconds, batch_seconds)

    if calibrate and frames:
        raise CelError("--calibrate is for whole utterances, which 'cel verify' compares; leave out --frames")
    if calibrate and not cutting.is_as_verified:
        raise CelError("--calibrate is for utterances as 'cel verify' compares them; leave out --segment-seconds")
    without_effect = {
        "--speakers is for intervals; add --bootstrap 1000, or": speakers and not bootstrap,
        "--windows-as is for windows; add --frames 200, or": windows_as != WHOLE.windows_as and not frames,
        "--windows is for windows; add --frames 200, or": windows != WHOLE.windows and not frames,
        "--segment-seconds is not for windows; leave out --frames, or": segment_seconds != WHOLE.segment_seconds
        and frames,
        "--cohort-root is for a cohort; add --cohort LIST, or": cohort_root and not cohort,
        "--top-n is for the adaptive s-norm; add --score-norm as, or": top_n != 300 and score_norm != "as",
    }
    for message, is_given in without_effect.items():
        if is_given:
            raise CelError(f"{message} leave it out")
    back_end = None
    if scoring or score_norm or subtract_mean or cohort:
        back_end = BackEndSettings(
            scoring="cosine" if scoring == "cosine" else "negative_euclidean",
            subtract_mean=subtract_mean,
            score_norm=score_norm,
            cohort=cohort,
            cohort_root=cohort_root,
            top_n=top_n,
        )
    out = out or Path("evaluation") / (protocol.lower() if protocol else trials.stem if trials else "")
    for folder in filter(None, (out, calibrate)):
        require_folder_or_nothing(folder)
    if calibrate:
        refuse_other_content(calibrate)
    listed = _listed_trials(protocol, trials, enrol, root)
    described = None
    if metadata is not None:
        # Before the embedding, which may take an hour.
        described = Metadata.read(metadata, listed.files)
        described.check(listed)
    if calibrate and any(len(excerpts) > 1 for excerpts in listed.recordings):
        logger.warning(
            "the calibration is fitted on models of several files, and 'cel verify' compares single ones unless it is "
            "given several: it holds for such models"
        )
    loaded = load_model(model)
    with progress_bar("Embedding") as progress:
        result = run_evaluation(
            loaded,
            listed,
            root,
            cutting=cutting,
            progress=progress,
            back_end=back_end,
            quality=quality,
            priors=tuple(dict.fromkeys(priors.replace(",", " ").split())),
            bootstrap=BootstrapSettings(bootstrap, seed, speakers) if bootstrap else None,
        )
    paths = result.write(out)
    diagnostics = None
    if metadata is not None or control:
        without_voice = None
        if control:
            with progress_bar("Control") as progress:
                without_voice = score_without_voice(loaded, root, listed, result.scores, progress=progress)
        diagnostics = diagnose(result, described, without_voice)
        paths |= diagnostics.write(out)
    if calibrate:
        result.calibrate(loaded).save(calibrate)
    text = [
        *_figures(result),
        *([diagnostics.text()] if diagnostics else []),
        *(f"{kind}: {path}" for kind, path in paths.items()),
        *([f"calibrated model: {calibrate}"] if calibrate else []),
    ]
    values = {**result.summary(), **{kind: str(path) for kind, path in paths.items()}}
    if protocol:
        values["protocol"] = protocol.lower()
    if diagnostics:
        values["diagnostics"] = diagnostics.model_dump(mode="json")
    if calibrate:
        values["calibrated_model"] = str(calibrate)
    emit(values, "\n".join(text), as_json=as_json)
    usable = calibrate or model
    suggest(f"cel verify --model {shlex.quote(str(usable))} ENROL TEST", as_json=as_json)


def _listed_trials(protocol: str | None, trials: Path | None, enrol: Path | None, root: Path) -> "Trials":
    from cel_dist.errors import CelError
    from cel_dist.evaluation.enrolment import Enrolment
    from cel_dist.evaluation.protocols import read_protocol
    from cel_dist.evaluation.trials import Trials

    if protocol is None and trials is None:
        raise CelError("nothing to score: give --trials FILE, or --protocol NAME for a public evaluation")
    if protocol is not None:
        if enrol is not None:
            raise CelError("--protocol finds its own list of models; leave out --enrol")
        return read_protocol(protocol, root, trials)
    return Trials.read(str(trials), enrolment=None if enrol is None else Enrolment.read(enrol))


def _figures(result: "Evaluation") -> list[str]:
    """The error rates in words."""
    intervals = result.intervals
    costs = [f"minDCF({prior}) {cost:.4f}" for prior, cost in result.min_dcf.items()]
    rate = f"EER {result.eer:.2%}"
    if intervals is not None:
        rate += f" ({intervals.eer[0]:.2%} to {intervals.eer[1]:.2%})"
        costs = [
            f"{cost} ({low:.4f} to {high:.4f})"
            for cost, (low, high) in zip(costs, intervals.min_dcf.values(), strict=True)
        ]
    lines = [
        "  ".join([rate, *costs, f"({len(result.trials)} trials, {len(result.trials.files)} utterances)"]),
    ]
    if intervals is not None:
        lines.append(f"95 % intervals over {intervals.speakers} speakers, drawn {intervals.replicates} times")
    calibrated = result.calibrated
    flatters = calibrated.fitted_on == "these trials"
    decisions = [f"actDCF({prior}) {cost:.4f}" for prior, cost in calibrated.act_dcf.items()]
    lines.append(
        "  ".join([f"Cllr {calibrated.cllr:.4f} (at best {calibrated.min_cllr:.4f})", *decisions])
        + f"  (calibrated on {calibrated.fitted_on}{', which flatters' if flatters else ''})"
    )
    return lines


@app.command(epilog="Example: cel embed --model runs/cel corpus/eval --out embeddings.npz")
def embed(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Audio files, or folders of them.")],
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="NPZ file to write: names [N], embeddings float32 [N, D].")],
    as_json: JsonOption = False,
) -> None:
    """Turn audio files into unit embeddings."""
    from cel_dist.evaluation import write_embeddings
    from cel_dist.model import load_model

    loaded = load_model(model)
    with progress_bar("Embedding") as progress:
        names = write_embeddings(loaded, paths, out, progress=progress)
    dimension = loaded.description.encoder.embedding_dim
    emit(
        {"out": str(out), "utterances": len(names), "embedding_dim": dimension},
        f"{len(names)} embeddings of {dimension} dimensions: {out}",
        as_json=as_json,
    )


@app.command(epilog="Example: cel verify --model models:/cel@champion alice.wav unknown.wav")
def verify(
    enrol: Annotated[
        list[str],
        typer.Argument(
            metavar="ENROL...",
            help="Audio of the known speaker, one file or several; with --store, the name they are enrolled under.",
        ),
    ],
    test: Annotated[Path, typer.Argument(help="Audio of the speaker in question.")],
    model: ModelOption,
    store: Annotated[
        Path | None, typer.Option(help="Store of enrolled people, see 'cel enrol'; ENROL is then a name.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell whether recordings are of the same speaker."""
    from cel_dist.errors import CelError
    from cel_dist.model import load_model
    from cel_dist.service.speakers import Speakers

    if store is None:
        result = load_model(model).verify(list(enrol), test)
    elif len(enrol) == 1:
        result = Speakers(load_model(model), store).verify(enrol[0], test)
    else:
        raise CelError("with --store, give one name and one file: cel verify --store STORE NAME TEST")
    text = f"score {result.score:.4f}"
    if result.probability is not None:
        text += f", probability of the same speaker {result.probability:.1%}"
    if result.same is None:
        text += f"\n{NO_THRESHOLD}"
    else:
        text += f": {'same' if result.same else 'different'} speaker{'' if result.same else 's'}"
        text += f" (threshold {result.threshold:.4f})"
    emit(asdict(result), text, as_json=as_json)


@app.command(epilog="Example: cel import-published cel_fastresnet34.model --out models/published")
def import_published(
    file: Annotated[Path, typer.Argument(metavar="FILE.model", help="Checkpoint of the published implementation.")],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    as_json: JsonOption = False,
) -> None:
    """Make a model of this project from a published CEL checkpoint."""
    from cel_dist.model import load_published

    loaded = load_published(file)
    loaded.save(out)
    encoder = loaded.description.encoder
    emit(
        {"model": str(out), "encoder": encoder.name, "embedding_dim": encoder.embedding_dim},
        f"{encoder.name}, {encoder.embedding_dim} dimensions: {out}",
        as_json=as_json,
    )
