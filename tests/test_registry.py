"""Names of methods: built-in, of installed packages, of files and of modules; and what is said of names that fail."""

import subprocess
import sys
from dataclasses import MISSING
from pathlib import Path

import pytest
from method_files import HELPER, NORM, write

import vlmslim
from vlmslim.registry import (
    BrokenMethod,
    address_of,
    build,
    is_method_name,
    label,
    listings,
    method,
    method_class,
    method_names,
    name_of,
    options_of,
    parse_method,
)

# --- built-in files ---------------------------------------------------------------------------------------------------


def test_built_in_names_are_the_files():
    files = {path.stem for path in Path(vlmslim.methods.__file__).parent.iterdir() if path.name[0] not in "_."}
    assert set(method_names()) == files
    assert list(method_names()) == sorted(method_names())
    for name in method_names():
        assert name_of(method_class(name)) == address_of(method_class(name)) == name


def test_names_alone_import_neither_torch_nor_methods():
    code = "import sys, vlmslim; vlmslim.method_names(); print([m for m in sys.modules if m in ('torch', 'numpy')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


OTHER = "from vlmslim.methods.fastv import FastV\nfrom vlmslim.registry import the_method\n"


@pytest.mark.parametrize(
    "file, text",
    [
        ("norm.py", NORM + HELPER),
        ("norm.py", OTHER + NORM),
        ("norm.py", NORM + HELPER + "\nAlias = Norm\n"),
        ("n_or_m.py", NORM),
        ("norm/__init__.py", NORM + HELPER),
        ("other.py", OTHER + NORM.replace("@dataclass", "@the_method\n@dataclass") + HELPER),
        ("helper.py", OTHER + NORM.replace("@dataclass", "@the_method\n@dataclass") + HELPER),
    ],
    ids=["helper", "import", "alias", "underscores", "folder", "marked", "marked-beside-the-name"],
)
def test_the_method_of_a_file(built_in, file, text):
    name = file.partition("/")[0].removesuffix(".py")
    built_in(file, text)
    assert name in method_names()
    cls = method_class(name)
    assert cls.__name__ == "Norm"
    assert name_of(cls) == address_of(cls) == name
    assert method(name, keep=4).keep == 4


def test_a_folder_may_keep_the_class_in_another_of_its_files(built_in):
    built_in("norm/rule.py")
    built_in("norm/__init__.py", "from .rule import Norm")
    assert name_of(method_class("norm")) == "norm"


def test_files_with_an_underscore_are_no_methods(built_in):
    built_in("_utils.py", "def f(): pass")
    assert "_utils" not in method_names()
    with pytest.raises(ValueError, match="unknown method '_utils'"):
        method_class("_utils")


BROKEN = {
    "holds no method: define .* underscore": "def f(): pass",
    r"does not say which class is its method \(Norm, Helper\)": NORM + HELPER,
    r"marks several classes as its method \(Norm, Helper\)": OTHER
    + (NORM + HELPER).replace("@dataclass", "@the_method\n@dataclass"),
    "cannot be imported: ModuleNotFoundError: No module named 'nowhere' .*utils.py, line 2": "\nimport nowhere",
    "cannot be imported: SyntaxError: .*utils.py, line 2": "\ndef f(:",
    "cannot be imported: ZeroDivisionError: division by zero .*utils.py, line 1": "1 / 0",
    "cannot be imported: SystemExit: 3": "raise SystemExit(3)",
    "from ._part import": "import _part",
    "frozen .*utils.py, line 6": NORM.replace("@dataclass", "@dataclass(frozen=True)"),
    "Utils has its own __init__; write the options as": "import vlmslim\nclass Utils(vlmslim.Compressor):\n"
    "    def __init__(self, keep=16):\n        self.keep = keep",
    "rename the option method of Utils": NORM.replace("Norm(", "Utils(").replace("keep:", "method:"),
    r"Utils lists options \(keep\); put @dataclass above it": NORM.replace("Norm(", "Utils(").replace("@dataclass", ""),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_file_stops_nothing_else(built_in, message):
    built_in("_part.py", "")
    file = built_in("utils.py", BROKEN[message])
    with pytest.raises(BrokenMethod, match=message) as error:
        method_class("utils")
    assert "\n" not in str(error.value)
    assert ("cannot be imported" in str(error.value)) == (error.value.__cause__ is not None)
    found = {listing.name: listing for listing in listings()}
    assert found["utils"].problem == str(error.value) and found["utils"].cls is None
    assert str(file) in found["utils"].problem
    assert [name for name in found if found[name].problem] == ["utils"]


def test_a_class_named_twice_up_to_case(built_in):
    built_in("norm.py", NORM + HELPER.replace("Helper", "NORM"))
    with pytest.raises(BrokenMethod, match=r"which class is its method \(Norm, NORM\)"):
        method_class("norm")


# --- installed packages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["outside:Norm", "norm"])
def test_an_entry_point_is_a_method(install, value):
    install(f"largest = {value}", package=value.partition(":")[0])
    assert "largest" in method_names() and "divprune" in method_names()
    made = method("largest", keep=3)
    assert made.keep == 3
    assert name_of(made) == address_of(made) == "largest"
    (listing,) = [listing for listing in listings() if listing.name == "largest"]
    assert listing.source == f"vlmslim-{value.partition(':')[0]}"
    assert (listing.kind, listing.paper, listing.summary) == (
        "before the language model",
        "2401.01234",
        "Keep the tokens with the largest norm.",
    )


@pytest.mark.parametrize(
    "point, text, message",
    [
        ("x = outside:Norm", "import nowhere", "method x of the package vlmslim-outside cannot be imported: ModuleNot"),
        ("x = outside:Nrm", NORM, "method x of the package vlmslim-outside cannot be imported: AttributeError"),
        ("x = outside:dataclass", NORM, "method x of the package vlmslim-outside is no subclass of vlmslim.Compressor"),
        ("x = outside", NORM, r"does not say which class is its method \(Norm\)"),
    ],
)
def test_a_broken_entry_point(install, point, text, message):
    install(point, text)
    with pytest.raises(BrokenMethod, match=message):
        method("x")
    assert [listing.name for listing in listings() if listing.problem] == ["x"]


def test_a_name_with_two_methods_is_neither(install):
    install("divprune = outside:Norm")
    with pytest.raises(BrokenMethod, match=r"several methods have the name divprune, of vlmslim itself .*outside:Norm"):
        method("divprune")
    (listing,) = [listing for listing in listings() if listing.problem]
    assert (listing.name, listing.source) == ("divprune", "built-in, vlmslim-outside")
    assert method("vlmslim.methods.divprune:DivPrune", keep=4) == vlmslim.methods.divprune.DivPrune(keep=4)
    assert method("outside:Norm").keep == 16
    assert method("fastv", keep=4).keep == 4


def test_two_packages_with_one_name(install):
    install("x = outside:Norm")
    install("x = second:Norm", package="second")
    with pytest.raises(BrokenMethod, match="vlmslim-outside .outside:Norm. .*vlmslim-second|vlmslim-second .*outside"):
        method("x")


# --- files and modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{file}", "{file}:Norm"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_file(tmp_path, monkeypatch, form, relative):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "my methods" / "norm.py")
    name = form.format(file=file.relative_to(tmp_path) if relative else file)
    made = method(name, keep=4)
    assert made.keep == 4 and name_of(made) == "norm"
    assert address_of(made) == f"{file}:Norm"
    assert method_class(address_of(made)) is type(made) is method_class(name), "it was loaded twice"
    assert is_method_name(name) and name not in method_names()
    assert label({"method": name, "keep": 4}) == "norm-4"
    assert parse_method(f"{name}:keep=8") == {"method": name, "keep": 8}


def test_a_folder_as_a_file(tmp_path):
    write(tmp_path / "norm" / "rule.py")
    file = write(tmp_path / "norm" / "__init__.py", "from .rule import Norm")
    assert name_of(method_class(f"{file}")) == "norm"


def test_an_edited_file_is_loaded_again(tmp_path):
    file = write(tmp_path / "norm.py")
    before = method_class(f"{file}")
    for keep in (17, 18):  # of one length, in one second
        write(file, NORM.replace("16", str(keep)))
        assert method(f"{file}").keep == keep
    assert before().keep == 16
    assert method_class(f"{file}") is method_class(f"{file}:Norm") is not before


def test_files_beside_it_are_imported_relatively_and_loaded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for folder, keep in (("a", 1), ("b", 2)):
        write(tmp_path / folder / "_utils.py", f"KEEP = {keep}")
        write(tmp_path / folder / "norm.py", NORM.replace("16", "KEEP").replace("@", "from ._utils import KEEP\n@", 1))
    assert [method(f"{tmp_path}/{folder}/norm.py").keep for folder in "aba"] == [1, 2, 1]
    write(tmp_path / "a" / "_utils.py", "KEEP = 3")
    assert [method(f"{tmp_path}/{folder}/norm.py").keep for folder in "ab"] == [3, 2]
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_file_that_fails_is_tried_again(tmp_path):
    write(tmp_path / "_utils.py", "KEEP = 1 / 0")
    file = write(tmp_path / "norm.py", "from ._utils import KEEP\n" + NORM.replace("16", "KEEP"))
    with pytest.raises(BrokenMethod, match=r"norm.py cannot be imported: ZeroDivisionError: .*_utils.py, line 1"):
        method(f"{file}")
    write(tmp_path / "_utils.py", "KEEP = 1")
    assert method(f"{file}").keep == 1


def test_an_option_needs_an_annotation(tmp_path):
    file = write(tmp_path / "norm.py", NORM.replace("keep: int = 16", "keep = 16"))
    with pytest.raises(ValueError, match=r"An option needs an annotation: write keep: float = \.\.\. in Norm"):
        method(f"{file}", keep=4)


def test_a_file_of_a_package_is_asked_for_by_the_name_of_its_module(tmp_path):
    write(tmp_path / "ours" / "__init__.py", "")
    for imports in ("from ours import helper", "from ..other import helper"):
        file = write(tmp_path / "ours" / "norm.py", f"{imports}\n{NORM}")
        with pytest.raises(BrokenMethod, match=f"to import .* ask for ours.norm:Class, with {tmp_path} on PYTHONPATH"):
            method(f"{file}")


def test_a_module(install, tmp_path, monkeypatch):
    install("", package="norm")
    write(tmp_path / "site-norm" / "deep" / "norm.py")
    for name in ("norm:Norm", "deep.norm", "deep.norm:Norm"):
        made = method(name)
        assert name_of(made) == "norm" and method_class(address_of(made)) is type(made)
        assert is_method_name(name)
        assert parse_method(f"{name}:keep=8") == {"method": name, "keep": 8}
    del sys.modules["deep"], sys.modules["deep.norm"]


def test_a_class_without_a_name(tmp_path):
    class Norm(vlmslim.Compressor):
        pass

    with pytest.raises(ValueError, match="Norm has no name to load it by.*define it at the top of a file"):
        address_of(Norm())


@pytest.mark.parametrize(
    "name, message",
    [
        ("divprun", r"unknown method 'divprun'. Did you mean 'divprune'\? Known: "),
        ("{folder}/nrm.py", "there is no file .*nrm.py; the working directory is"),
        ("{folder}/norm.py:Nrm", r"norm.py has no class Nrm. Did you mean 'Norm'\?"),
        ("{folder}/norm.py:dataclass", "norm.py:dataclass is no subclass of vlmslim.Compressor"),
        ("mine:Norm", "there is no module mine; for the file write mine.py:Class"),
        ("sub.norm", "there is no module sub.norm; for the file write sub/norm.py:Class"),
        ("elsewhere:Norm", "there is no module elsewhere; is its package installed?"),
        ("vlmslim.methods.fastw:FastV", "vlmslim.methods.fastw cannot be imported: ModuleNotFoundError"),
        ("some/folder", "unknown method 'some/folder'"),
        ("sub/norm", "unknown method 'sub/norm'. For the file write sub/norm.py:Class"),
        ("norm.py:Outer.Norm", "For the file write norm.py:Class"),
        ("norm.py:keep", "norm.py has no class keep. Its methods: Norm; options are written name=value"),
    ],
)
def test_names_that_lead_nowhere(tmp_path, monkeypatch, name, message):
    for file in ("norm.py", "mine.py", "sub/norm.py"):
        write(tmp_path / file)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        method(name.format(folder=tmp_path))
    assert "\n" not in str(error.value)


def test_folders_and_repositories_are_no_names_of_methods(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs.old").mkdir()
    for text in ("bundled/tiny-atp-16", "org/model.v2", "./x", "runs.old", "divprun"):
        assert not is_method_name(text)
    for text in ("divprune", "runs.new", "a:B", "a/b.py", "a/b.py:C"):
        assert is_method_name(text)


# --- options, labels --------------------------------------------------------------------------------------------------


def test_options_and_their_defaults():
    assert options_of("fastv") == options_of(method_class("fastv")) == {"keep": MISSING, "layer": 2}
    assert options_of(method("fastv", keep=3)).keys() == {"keep", "layer"}
    assert options_of("none") == {}


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: method("fastv", keep=4, layr=3),
            r"unknown option of fastv 'layr'. Did you mean 'layer'\? Known: keep, l",
        ),
        (lambda: method("none", keep=4), "unknown option of none 'keep'. Known: none"),
        (lambda: method("fastv"), "fastv needs the option keep: give keep=...; its options are keep, layer"),
        (lambda: method("schedule", layer=3, counts=4), r"layer=3: give a list \(number\)"),
        (lambda: build(3), "a stage is a name, a method object or a dictionary with the key 'method', not 3"),
        (
            lambda: build(vlmslim.ScoreAndKeep),
            r"ScoreAndKeep is a class: give an object, such as ScoreAndKeep\(keep=64\)",
        ),
        (lambda: build({"keep": 3}), "a stage is a name, a method object or a dictionary"),
        (lambda: parse_method("fastv:3"), "'fastv:3': write options as name:option=value, such as fastv:layer=3"),
        (lambda: parse_method("fastv:layer"), "write options as name:option=value"),
        (lambda: parse_method("fastv:layr=3"), "unknown option of fastv 'layr'. Did you mean 'layer'"),
        (lambda: parse_method("divprun:keep=3"), "Did you mean 'divprune'"),
        (lambda: parse_method("divprune:keep=3:keep=4"), "'divprune:keep=3:keep=4' gives keep twice"),
    ],
)
def test_mistakes_in_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_building_and_parsing():
    divprune = method("divprune", keep=4)
    assert build(divprune) is divprune
    assert build({"method": "divprune", "keep": 4}) == divprune == build(parse_method(" divprune:keep=4 "))
    assert build("none") == method("none")
    assert parse_method("fastv: layer = 3:keep=0.5") == {"method": "fastv", "layer": 3, "keep": 0.5}
    assert parse_method("divprune:newline=rows:keep=None") == {"method": "divprune", "newline": "rows", "keep": None}


def test_labels():
    assert label("divprune") == "divprune"
    assert label("bundled/tiny-atp-16") == "bundled/tiny-atp-16"
    assert label({"method": "fastv", "layer": 3, "keep": 64}) == "fastv-64-layer=3"
    assert label({"method": "atp", "weights": "a/b c"}) == "atp-weights=a_b_c"
    assert label([{"method": "divprune", "keep": 0.5}, "none"]) == "divprune-0.5+none"
    assert label(method("fastv", keep=4)) == "FastV(keep=4, layer=2)"


def test_kinds_and_papers():
    found = {listing.name: listing for listing in listings()}
    kinds = {name: found[name].kind for name in ("random", "divprune", "fastv", "aim", "atp")}
    assert list(kinds.values()) == [
        "baseline",
        "before the language model",
        "between decoder layers",
        "pipeline",
        "trained",
    ]
    assert found["fastv"].paper == "2403.06764" and found["random"].paper == ""
    assert all(listing.source == "built-in" and not listing.problem for listing in found.values())
    for listing in found.values():
        assert listing.summary.endswith("."), f"{listing.name}: {listing.summary}"
