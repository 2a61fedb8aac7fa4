"""What can be chosen when a vector is made, dosed or exported; light, for those who only describe it."""

from __future__ import annotations

from typing import Literal

Method = Literal["caa", "pca", "lm_steer", "prompt"]
Positions = Literal["answer", "last"]
Combine = Literal["add", "orthogonal", "ties", "dare"]
Answers = Literal["as_given", "texts"]
FileFormat = Literal["gguf", "safetensors"]
