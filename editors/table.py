"""The table of editing methods. A new one is one file in its family and one line here."""

from __future__ import annotations

from typing import Any

from editors.closed_form.alphaedit import AlphaEdit
from editors.closed_form.emmet import Emmet, RRome
from editors.closed_form.memit import Memit
from editors.closed_form.pmet import Pmet
from editors.closed_form.rome import Rome
from editors.closed_form.t_patcher import TPatcher
from editors.closed_form.ultraedit import UltraEdit
from editors.finetune.adalora import AdaLora
from editors.finetune.ft import Ft
from editors.finetune.ia3 import Ia3Editor
from editors.finetune.lora import LoraEditor
from editors.learned.mend import MendEditor
from editors.learned.serac import SeracEditor
from editors.memory.constrained import Constrained
from editors.memory.grace import Grace
from editors.memory.in_context import InContext
from editors.memory.wise import Wise
from editors.method import Editor

METHODS: dict[str, Editor[Any]] = {
    editor.name: editor
    for editor in (
        Rome(),
        RRome(),
        TPatcher(),
        Memit(),
        Emmet(),
        Pmet(),
        AlphaEdit(),
        UltraEdit(),
        Ft(),
        LoraEditor(),
        AdaLora(),
        Ia3Editor(),
        Grace(),
        InContext(),
        Constrained(),
        Wise(),
        MendEditor(),
        SeracEditor(),
    )
}
