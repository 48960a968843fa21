"""LatentVideoPipeline: labels and seeds in, videos out; a diffusers pipeline of a video VAE and a Latte.

pipe = LatentVideoPipeline.from_pretrained("runs/latte/pipeline")
frames = pipe(class_labels=[0, 1], seeds=[0, 1], guidance_scale=4.0).frames   # two lists of PIL images
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin

from data.core.files import read_json, write_json
from denoiser.latte import Latte
from pipelines import generation
from vae.registry import vae_class

BUNDLE = re.compile(r"omnilatte_\w+")  # modules of an export (pipelines/results/bundle.py); never run here
PARTS = ("vae", "transformer")


class LatentVideoPipeline(generation.LatentVideoPipeline):
    """Load and save the pipeline of pipelines/generation.py without running code that lies beside the weights.

    vae: any continuous VideoVAE with a scaling rule. transformer: a Latte. class_names: [] when unconditional.
    """

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "LatentVideoPipeline":
        """A saved or exported pipeline, made of this project's classes; code in the folder is never run.

        ValueError when model_index.json names other classes, or when code lies there that no export writes: diffusers
        imports any module that is named in the index, and before 0.38 runs code that it finds beside the weights.
        """
        index = Path(folder) / "model_index.json"
        if not index.is_file():
            return super().from_pretrained(folder, **kwargs)
        # The classes of the index must be this project's, by name or as an export writes them.
        named = read_json(index)
        names, modules = {}, {}
        for part in PARTS:
            names[part] = _class_named(part, named.get(part), index)
            modules[part] = named[part][0]
        whole = named.get("_class_name")
        if isinstance(whole, list) and len(whole) == 2 and BUNDLE.fullmatch(str(whole[0])):
            modules[""], whole = whole
        if whole != cls.__name__:
            raise ValueError(f"{index}: {named.get('_class_name')} is not that of a {cls.__name__}")
        # No code but that of the export may lie there.
        bundled = {Path(folder, part, f"{m}.py") for part, m in modules.items() if BUNDLE.fullmatch(m)}
        if code := sorted(set(Path(folder).rglob("*.py")) - bundled):
            raise ValueError(f"{code[0]}: code in the folder of a pipeline is never run; remove it")
        if not bundled:
            return super().from_pretrained(folder, **kwargs)
        with tempfile.TemporaryDirectory(prefix="omnilatte-") as plain:  # the same folder without its code
            write_json(Path(plain) / "model_index.json", named | names | {"_class_name": cls.__name__})
            for part in PARTS:
                (Path(plain) / part).mkdir()
                for file in Path(folder, part).iterdir():
                    if file.suffix != ".py":
                        (Path(plain) / part / file.name).symlink_to(file.resolve())
            return super().from_pretrained(plain, **kwargs)


def _class_named(part: str, named: Any, index: Path) -> list[str]:
    """[module, class] of this project for an entry of model_index.json, else ValueError."""
    # The class of that name, if this project has one that fits the part
    module, name = named if isinstance(named, list) and len(named) == 2 else (None, None)
    find = {"Latte": Latte}.get if part == "transformer" else vae_class
    found = find(name) if isinstance(name, str) else None
    usable = found is not None and not getattr(found, "discrete", False)
    if not usable or (module != found.__module__ and not BUNDLE.fullmatch(str(module))):
        raise ValueError(f"{index}: {part} is {named}, not a class of this project")
    # diffusers looks in the module of a class for how to load it.
    vars(sys.modules[found.__module__]).setdefault("ModelMixin", ModelMixin)
    return [found.__module__, name]
