"""The options of computing, dosing and exporting a vector. Imports nothing heavy, so that tools can use them at
once."""

from __future__ import annotations

from typing import Literal

Method = Literal["caa", "pca", "lm_steer", "prompt"]
Positions = Literal["answer", "last"]
Combine = Literal["add", "orthogonal", "ties", "dare"]
Answers = Literal["as_given", "texts"]
FileFormat = Literal["gguf", "safetensors"]
