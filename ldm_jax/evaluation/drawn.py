"""Images that are drawn from a diffusion run, and what they are drawn for."""

import pathlib

from ldm_jax.evaluation import generate, images, prompt_list
from ldm_jax.runs import checkpoint
from ldm_jax.training import restore, sampling, streams


def of_run(
    run: restore.Restored,
    settings: sampling.Settings,
    *,
    num: int,
    seed: int,
    ema: str,
    prompts: str = "",
    labels: str = "",
) -> images.Images:
    """`num` samples of a run.

    `prompts` as in prompt_list.read, by default the captions of the reporting split; `labels` one of generate.BALANCES, by default
    'equal'. A condition that is read from images is that of the reporting split's, in order, and so are labels by default. Raises
    ValueError for either where the run takes none.
    """
    config, classes = run.experiment, sampling.classes(run.model)
    if "prompts" in run.model.conditioning.takes:
        prompts = prompts or f"split:{config.split.report}"
    texts = prompt_list.read(run, prompts, num) if prompts else []
    sampling.make_times(run.model, settings)  # these two raise ValueError for settings that do not fit
    sampling.make_generate(run.model, settings)
    cond = generate.asked(run, num, (), texts, config.split.report)
    if classes and cond.source is not None and not labels:
        labels = "rows"
    elif classes:
        labels = labels or "equal"
        training = streams.source(config, "train") if labels == "dataset" else None
        cond = cond._replace(labels=generate.balanced(labels, num, classes, seed, training))
    elif labels:
        raise ValueError(f"--labels={labels}: this run takes no labels")

    def batches():
        drawn = generate.draw(
            run,
            settings,
            cond,
            count=num,
            seed=seed,
            tokenizer=config.tokenizer,
            batch_size=config.sample_batch_size,
            quiet=True,
        )
        yield from images.with_labels(drawn, cond.labels)

    made_by = {"step": run.step, "checkpoint": run.sha256, "ema": ema, "seed": seed}
    made_by |= {"sampler" if k == "name" else k: v for k, v in settings._asdict().items()}
    made_by["evaluations"] = sampling.evaluations(settings)
    if prompts:
        made_by["prompts"] = prompts
        if not prompts.startswith("split:"):
            made_by["prompts_sha256"] = checkpoint.sha256(pathlib.Path(prompts))
    if labels:
        made_by["labels"] = labels
    if cond.split:
        made_by["conditions"] = f"split:{cond.split}"
    return images.Images(batches, num, made_by, images.names(cond.labels), classes, cond.prompts)
