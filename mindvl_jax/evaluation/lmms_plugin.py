"""Plug-in for lmms-eval 0.7: the field's own task code scores our model.

    python -m lmms_eval --model mindvl --model_args weights=DIR,batch=32 --tasks docvqa_val

Found through the entry point `[lmms_eval.models] mindvl = mindvl_jax.evaluation.lmms_plugin:MANIFEST`. lmms-eval itself
is not a requirement of this package; it imports this module, never the other way round.
"""

from __future__ import annotations

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from mindvl_jax.core.errors import UserError
from mindvl_jax.inference import Generator, Request, Sampling
from mindvl_jax.inference.loading import open_for_inference


class MindVL(lmms):
    """Answer lmms-eval's `generate_until` requests.

    Args:
      weights: folder of a model, as for `mindvl evaluate`.
      batch: answers that decode together. mesh: devices, such as `data=2`. min_pixels, max_pixels: image areas.
    """

    is_simple = True

    def __init__(
        self,
        weights: str,
        batch: int | str = 16,
        mesh: str | None = None,
        min_pixels: int | str | None = None,
        max_pixels: int | str | None = None,
        **_,
    ):
        super().__init__()
        self._pixels = {
            key: int(value)
            for key, value in dict(min_pixels=min_pixels, max_pixels=max_pixels).items()
            if value is not None
        }
        # On the command line a mesh's comma would end the argument, so a plus may stand for it.
        self._generator = Generator(
            open_for_inference(weights, mesh=mesh.replace("+", ",").replace(":", "=") if mesh else None),
            slots=int(batch),
        )

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer for each request, in order."""
        return [
            answer.text
            for answer in self._generator.generate(
                [self._request(number, request) for number, request in enumerate(requests)]
            )
        ]

    def _request(self, number: int, request: Instance) -> Request:
        context, settings, doc_to_visual, doc_id, task, split = request.args
        pictures = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        stop = settings.get("until") or ()
        sampling = Sampling(
            max_new_tokens=int(settings.get("max_new_tokens", 128)),
            temperature=float(settings.get("temperature") or 0) if settings.get("do_sample") else 0.0,
            top_p=float(settings.get("top_p") or 1.0),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            seed=number,
        )
        text = context.replace("<image>", "").replace("<video>", "")
        return Request.from_prompt(
            text, tuple(pictures), id=f"{task}/{split}/{doc_id}", sampling=sampling, **self._pixels
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise UserError(
            "MindVL answers lmms-eval's generate_until tasks only; choose a task variant of that output type"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise UserError("MindVL answers lmms-eval's single-round tasks only")


MANIFEST = ModelManifest(model_id="mindvl", simple_class_path="mindvl_jax.evaluation.lmms_plugin.MindVL")
