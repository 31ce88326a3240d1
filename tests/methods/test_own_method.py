"""The method of a user's own in the documentation, run as it stands there and found by its entry point."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import METHOD_SPECS, Kind, MethodSpec
from autopeft.export.export import export_adapter
from autopeft.methods import METHODS, attach, count_parameters, is_found_elsewhere, register
from autopeft.search_spaces import PerLayer
from tests.exports import trained
from tests.tiny_models import fingerprint, logits_of, tiny_backbone, tiny_batch

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "own-method.md"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the page's module on the path as a package that has its entry point."""
    page = PAGE.read_text(encoding="utf-8")
    code, _, entry, _ = re.findall(r"```(?:python|toml)\n(.*?)```", page, re.DOTALL)
    folder = tmp_path / "propulsion-1.0.dist-info"
    folder.mkdir()
    (tmp_path / "propulsion.py").write_text(code, encoding="utf-8")
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: propulsion\nVersion: 1.0\n")
    group, line = re.findall(r'"(.*?)"]\n(.*)\n', entry)[0]
    (folder / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("propulsion", None)
    METHOD_SPECS.pop("propulsion", None)
    vars(sys.modules["autopeft.methods.registry"])["_METHODS"].pop("propulsion", None)


def test_the_page_s_method_is_like_any_other(installed: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown method 'propulsiom'"):
        Adapter("propulsiom")
    own = {"method": "propulsion"}
    sites = {"0.query": own, "1.ffn_up": own, "1.value": {"method": "ia3"}}
    configuration = Configuration.from_dict({"sites": sites})
    backbone = tiny_backbone("bert")
    before, plain = fingerprint(backbone.model), logits_of(backbone)
    with attach(backbone, configuration) as attachment:
        torch.testing.assert_close(logits_of(backbone), plain)
        counted = count_parameters(backbone, configuration) - backbone.head_parameters
        assert counted == 32 + 64 + 32
        attachment.parameters["0.query.propulsion.scale"].data.add_(1.0)
        assert not torch.allclose(logits_of(backbone), plain)
    assert fingerprint(backbone.model) == before
    state = trained(backbone, configuration)
    export_adapter(backbone, configuration, state, tmp_path / "out", probe=tiny_batch(), fresh=False)
    slots = PerLayer(methods=("lora", "propulsion")).slots(backbone)
    assert {method for slot in slots for method in slot.choices} == {"lora", "propulsion"}
    assert is_found_elsewhere("propulsion")
    assert is_found_elsewhere("ia3")


def test_without_an_entry_point_its_export_is_checked_where_it_is_known(
    installed: None, tmp_path: Path
) -> None:
    (tmp_path / "propulsion-1.0.dist-info" / "entry_points.txt").unlink()
    import propulsion  # type: ignore[import-not-found] # noqa: F401

    configuration = Configuration.from_dict({"sites": {"0.query": {"method": "propulsion"}}})
    backbone = tiny_backbone("bert")
    backbone.model.config.save_pretrained(tmp_path / "base")
    backbone.origin = str(tmp_path / "base")
    state = trained(backbone, configuration)
    report = export_adapter(backbone, configuration, state, tmp_path / "out", probe=tiny_batch())
    assert "another process would find 'propulsion' by an entry point alone" in report.checked


def test_another_setting_of_a_family_of_peft_s_is_a_row() -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[-1]
    backbone = tiny_backbone("bert")
    plain = logits_of(backbone)
    try:
        exec(code, {})
        assert not is_found_elsewhere("coft")
        adapter = Adapter("coft", 4)
        with attach(backbone, Configuration({Site(0, "query"): adapter})) as attachment:
            torch.testing.assert_close(logits_of(backbone), plain)
            names = [name for name in attachment.parameters if name.startswith("0.query.coft.")]
            own = sum(attachment.parameters[name].numel() for name in names)
            assert own == METHODS["coft"].count(backbone.shape(Site(0, "query")), adapter) == 8 * 6
    finally:
        METHOD_SPECS.pop("coft", None)
        vars(sys.modules["autopeft.methods.registry"])["_METHODS"].pop("coft", None)


def test_a_name_of_autopeft_s_and_a_symbol_are_taken_once(installed: None) -> None:
    linear: frozenset[Kind] = frozenset({"linear"})
    with pytest.raises(ValueError, match="there is 'lora' with 'L'"):
        register(METHODS["lora"], MethodSpec(name="lora", symbol="Zz", kinds=linear))
    import propulsion

    with pytest.raises(ValueError, match="there is 'lora' with 'L'"):
        register(propulsion.Propulsion(), MethodSpec(name="propulsion", symbol="L", kinds=linear))
    with pytest.raises(ValueError, match="name of Propulsion is 'propulsion' and that of its specification"):
        register(propulsion.Propulsion(), MethodSpec(name="propulsor", symbol="Zz", kinds=linear))
    assert "propulsor" not in METHODS


def test_one_s_own_takes_the_place_of_an_earlier_one(installed: None) -> None:
    """As where a notebook's cell is run again."""
    import propulsion

    again = MethodSpec(name="propulsion", symbol="Pp", kinds=frozenset({"linear"}))
    register(own := propulsion.Propulsion(), again)
    assert METHODS["propulsion"] is own
    assert METHOD_SPECS["propulsion"] is again


def test_a_size_that_makes_the_adapter_of_a_smaller_one_is_left_out() -> None:
    backbone = tiny_backbone("bert")
    families = ("lora", "lokr", "pissa", "olora", "deft", "tinylora")
    space = PerLayer(methods=families, sizes={"rank": (1, 64), "length": (4, 16)})
    by_name = {slot.name: slot.choices for slot in space.slots(backbone)}
    sizes = {name: tuple(choice.sizes) for name, choice in by_name["0.query"].items()}  # of 32 → 32
    whole = (1, 2, 4, 8, 16, 32)
    assert sizes == {"lora": (*whole, 64), "tinylora": (4, 8, 16), "lokr": (1, 2, 4)} | dict.fromkeys(
        ("pissa", "olora", "deft"), whole
    )


def test_sites_of_a_family_say_why_they_cannot_take_it() -> None:
    backbone = tiny_backbone("bert")
    with pytest.raises(ValueError, match=r"'oft' cannot sit on 0\.query of tiny-bert: .*Invalid"):
        attach(backbone, Configuration({Site(0, "query"): Adapter("oft", 5)}))
    space = PerLayer(methods=("oft", "vera"), sizes={"oft": (2, 48)})
    sizes = {tuple(slot.choices["oft"].sizes) for slot in space.slots(backbone) if "oft" in slot.choices}
    assert sizes == {(2, 4, 8, 16, 32)}
    with pytest.raises(ValueError, match="Unknown size or method in sizes 'lora'"):
        PerLayer(methods=("oft",), sizes={"lora": (1, 2)})
