"""The head of a card, which the hub reads: what the model is for, where it came from, how it did."""

import math
from typing import TYPE_CHECKING

from rlhf_pipeline.cards.made import Made, base_model
from rlhf_pipeline.cards.markdown import plain
from rlhf_pipeline.data import hub_set
from rlhf_pipeline.report import members, number

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

# Figures on rows held out, by their names in `results` and `evaluation.json`: the hub's metric, and a title.
_HELD_OUT = {
    "eval_loss": ("loss", "held-out loss"),
    "eval_perplexity": ("perplexity", "held-out perplexity"),
    "accuracy": ("accuracy", "held-out accuracy"),
    "prompt_accuracy": ("accuracy", "held-out accuracy, mean over prompts"),
    "calibration_error": ("calibration_error", "expected calibration error"),
    "length_correlation": ("pearsonr", "correlation of score and length"),
}
_COMPARED = {
    "reward_mean": ("mean_reward", "mean reward"),
    "kl": ("kl", "KL to the reference policy"),
    "perplexity": ("perplexity", "perplexity under the base model"),
    "distinct_2": ("distinct_2", "share of distinct bigrams"),
}


def metadata(made: Made) -> "ModelCardData":
    """Ids are such by their form, and names are one plain line."""
    from huggingface_hub import ModelCardData

    kind = "reward-model" if made.stage == "reward" else plain(made.stage)
    sets = [hub_set(choice) for choice in (made.data, members(made.settings.get("ptx"))) if choice]
    results = _eval_results(made)
    return ModelCardData(
        library_name="rlhf_pipeline" if made.own_class else "transformers",  # the hub shows how a library opens it
        pipeline_tag="text-generation" if made.causal else "text-classification",
        tags=["rlhf_pipeline", "rlhf", "trl", kind],
        base_model=base_model(made.run),
        datasets=[name for name in dict.fromkeys(sets) if name] or None,
        model_name=f"{plain(made.run.get('name'))} {plain(made.stage)}" if results else None,
        eval_results=results or None,
    )


def _eval_results(made: Made) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    task = "text-generation" if made.causal else "text-classification"
    compared = members(members(made.evaluation.get("metrics")).get(made.row or ""))
    found = []
    for run, figures, known in ((made.run, made.results, _HELD_OUT), (made.judged, compared, _COMPARED)):
        data = members(run.get("data"))
        if not data:
            continue
        for key, (metric, title) in known.items():
            value = number(figures.get(key))
            if value is None or not math.isfinite(value):
                continue
            result = EvalResult(
                task_type=task,
                dataset_type=hub_set(data) or plain(data.get("name")),
                dataset_name=plain(data.get("name")),
                dataset_split="test",
                dataset_args={"sha256": plain(data.get("sha256"))},
                metric_type=metric,
                metric_name=title,
                metric_value=float(f"{value:.6g}"),
            )
            found.append(result)
    return found
