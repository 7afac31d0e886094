"""The models of a suite: what is known of one before its weights are loaded, and the loading."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from daekit.data.responses import render
from daekit.errors import UserError, first_line
from daekit.files import directory_hashes
from daekit.generation.local import device
from daekit.models.adapters import holds_tokenizer, tokenizer_spec
from daekit.models.identity import fingerprint
from daekit.models.loading import adapter_config, load_model, load_tokenizer_of, merge_adapter, not_here
from daekit.models.placement import free_memory
from daekit.recipe.adapter_config import holds_adapter, read_adapter_config
from daekit.recipe.schema import ModelSpec
from daekit.recipe.suite import SuiteModelSpec


class SuiteModel:
    """One model of a suite. Tokenizer, config and weights are loaded when they are first asked for.

    Args:
        name: Its name in the report.
        spec: as a suite names it; ``stage`` already resolved.
    """

    def __init__(self, name: str, spec: SuiteModelSpec) -> None:
        self.name, self.spec = name, spec
        self._model: PreTrainedModel | None = None

    @property
    def is_endpoint(self) -> bool:
        """Whether it is asked over HTTP."""
        return self.spec.url is not None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the adapter where there is one, else that beside its base."""
        adapter, base = self.spec.adapter, self._spec_of(str(self.spec.path), self.spec.revision)
        own = adapter is not None and holds_tokenizer(adapter)
        return load_tokenizer_of(ModelSpec(path=adapter) if own else tokenizer_spec(base))

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config of the model that carries the weights (of an adapter: its base's)."""
        path = self._chain()[-1]
        try:
            return AutoConfig.from_pretrained(
                path, revision=self.spec.revision, trust_remote_code=self._is_trusted(path)
            ).get_text_config()
        except (OSError, ValueError) as error:
            where = f"models.{self.name}: no model could be found at {path}{not_here(path)}"
            raise UserError(f"{where} ({first_line(error)})") from error

    def require_there(self) -> None:
        """Look at config, adapter and tokenizer; UserError if the model is not there."""
        _ = self.config
        if self.spec.adapter is not None:
            adapter_config(self.spec.adapter)
        _ = self.tokenizer

    @property
    def context_length(self) -> int | None:
        """The longest sequence that the model is made for, in tokens; None if its config does not say."""
        return getattr(self.config, "max_position_embeddings", None)

    def model(self) -> PreTrainedModel:
        """The model, with its adapter merged, on the accelerator if there is one."""
        if self._model is None:
            loaded = load_model(self._spec_of(str(self.spec.path), self.spec.revision))
            if self.spec.adapter is not None:
                loaded = merge_adapter(loaded, Path(self.spec.adapter).expanduser())
            self._model = loaded if self.spec.quantization else loaded.to(device())
        return self._model

    def free(self) -> None:
        """Forget the weights."""
        self._model = None
        free_memory()

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """What a score depends on: where the model is, which weights, which tokenizer and template. Loads no weights."""
        if self.is_endpoint:
            return {"kind": "endpoint", "url": self.spec.url, "model": self.spec.served_model}
        told = {key: value for key, value in vars(self.spec).items() if value is not None and key != "api_key_env"}
        files = [file_fingerprint(Path(path).expanduser()) for path in (*self._chain(), self.spec.adapter) if path]
        return {
            "kind": "model",
            "told": told,
            "commit": getattr(self.config, "_commit_hash", None),
            "files": files,
            "dtype": str(getattr(self.config, "dtype", None)),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }

    def weights_fingerprint(self) -> str | None:
        """The fingerprint of the loaded weights; None while they are not loaded."""
        return None if self._model is None else fingerprint(self._model)

    def _spec_of(self, path: str, revision: str | None) -> ModelSpec:
        same = {key: getattr(self.spec, key) for key in ("dtype", "attn_implementation", "quantization")}
        return ModelSpec(path=path, revision=revision, trust_remote_code=self._is_trusted(path), **same)

    def _is_trusted(self, path: str) -> bool:
        """Whether code of a path may run: trust is given to the path in the suite, and not to a base that an adapter names."""
        return self.spec.trust_remote_code and path == self.spec.path

    def _chain(self) -> list[str]:
        """The path, and while that is an adapter the base that it names; the last carries the weights."""
        chain = [str(self.spec.path)]
        while holds_adapter(chain[-1]):
            chain.append(read_adapter_config(chain[-1])["base_model_name_or_path"])
        return chain


_PROBES = (
    (("user", " A question? "),),
    (("system", "Be brief."), ("user", "One")),
    (("user", "One"), ("assistant", " Two\n"), ("user", "Three")),
    (("user", "One"), ("assistant", "<think>a</think>Two")),
)


def file_fingerprint(directory: Path) -> dict[str, str] | None:
    """File -> hash of all of it: weights and configs of a directory; None for a hub id.

    Every byte is read: a training may have changed no more than one layer.
    """
    return directory_hashes(directory, (".safetensors", "config.json"))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary, of how a text is cut, of the special tokens and of the tokens that the chat template makes."""
    facts: list[Any] = [
        sorted(tokenizer.get_vocab().items()),
        sorted(map(str, tokenizer.special_tokens_map.items())),
        _template_tokens(tokenizer),
    ]
    if tokenizer.is_fast:
        how = json.loads(tokenizer.backend_tokenizer.to_str())
        # padding and truncation are those of the last call
        facts.append({key: value for key, value in how.items() if key not in ("padding", "truncation")})
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def _template_tokens(tokenizer: PreTrainedTokenizerBase) -> list[Any] | None:
    """The tokens of some conversations: templates whose texts differ but which make the same tokens are the same."""
    if tokenizer.chat_template is None:
        return None
    made: list[Any] = []
    options = {"strftime_now": lambda _: "01 Jan 2024"}  # a template that names today would be another one tomorrow
    for probe, opened in itertools.product(_PROBES, (False, True)):
        messages = [{"role": role, "content": text} for role, text in probe]
        try:
            rendered = render(tokenizer, messages, "a probe", options=options, add_generation_prompt=opened)
            made.append([*rendered["input_ids"]])
        except UserError:  # it refuses the roles
            made.append("refused")
    return made
