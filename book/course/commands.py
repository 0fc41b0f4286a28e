"""Owns ``python main.py course``: what a learner types, and what they read.

Knows neither syntax trees nor pytest.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from book.course.check import crash_site, run_tests, to_blame
from book.course.manifest import Chapter, chapter, read_manifest
from book.course.native import build
from book.course.workbook import Workbook, in_parts, module_file, whole
from tiny_llm.errors import ConfigError

ChapterArgument = Annotated[str, typer.Argument(metavar="CHAPTER", help="Its number, such as 1.1.")]
FolderOption = Annotated[Path, typer.Option(help="Where your code lies.")]
MY_FOLDER = Path("my_llm")
_CRASHES: Mapping[str, str] = {
    "SIGSEGV": " It read or wrote where nothing is: an index too far?",
    "SIGILL": " A function without a return, or undefined behaviour, ends so.",
    "SIGFPE": " A whole number was divided by 0.",
}

app = typer.Typer(
    help="Build this runtime yourself, chapter by chapter; what you have not written is the reference's.",
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.command("list")
def list_chapters(folder: FolderOption = MY_FOLDER) -> None:
    """Show the chapters: minutes, what each needs, what is done."""
    book = Workbook(folder)
    rows = [
        (it.id, it.title, str(it.minutes), ", ".join(it.needs) or "-", book.state(it))
        for it in read_manifest().values()
    ]
    for row in [("CHAPTER", "TITLE", "MINUTES", "NEEDS", "STATE"), *rows]:
        print("{:<8} {:<34} {:>7}  {:<8} {}".format(*row))


@app.command()
def start(number: ChapterArgument, folder: FolderOption = MY_FOLDER) -> None:
    """Write what the chapter has you fill in; nothing of yours is overwritten."""
    it, book = _chapter(number), Workbook(folder)
    new, kept = book.start(it)
    for definition in (*new, *kept):
        module, name = in_parts(definition)
        print(f"{'written' if definition in new else 'kept':<8} {module_file(folder, module)}: {name}")
    print(f"Read book/docs/{it.page}, fill them in, then: python main.py course check {it.id}")
    _warn_of_drift(book)


@app.command()
def check(number: ChapterArgument, folder: FolderOption = MY_FOLDER) -> None:
    """Run the chapter's tests on your code, and find what is to blame when they fail."""
    it, book = _chapter(number), Workbook(folder)
    missing = book.stubs(it)
    if missing:
        names = ", ".join(in_parts(definition)[1] for definition in missing)
        todo = "" if book.state(it) != "not begun" else f" (python main.py course start {it.id} makes a file)"
        raise ConfigError(f"Chapter {it.id}: still to be written in {folder}: {names}{todo}.")
    _warn_of_drift(book)
    written = book.written()
    print(f"Yours: {', '.join(in_parts(definition)[1] for definition in written)}. All else: the reference.")
    for kernel in book.kernels():
        build(kernel, folder)
    done = run_tests(it, folder)
    print(done.stdout.strip() or done.stderr.strip())
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ConfigError(f"Your code crashed ({name}). {crash_site(done.stderr)}{_CRASHES.get(name, '')}")
    if done.returncode > 1:
        raise ConfigError("The tests could not start; what stands above says why.")
    if done.returncode:
        _blame(it, folder, written)
        raise typer.Exit(1)
    book.mark_done(it)
    print(f"Chapter {it.id} is done.")


def _blame(it: Chapter, folder: Path, written: list[str]) -> None:
    if len(written) == 1:
        print(f"The fault is in {in_parts(written[0])[1]}, the one definition that is yours.")
        return
    print("Which definition is to blame? Trying the reference for each of yours ...")
    guilty = list(to_blame(it, folder, written))
    for definition in guilty:
        own = next((c.id for c in read_manifest().values() if definition in c.teaches), None)
        where = "this chapter" if definition in it.teaches else f"chapter {own}" if own else "no chapter"
        module, name = in_parts(definition)
        print(f"The fault is in {name} ({where}), {module_file(folder, module)}: with ours the tests pass.")
    if not guilty:
        print("No single one: more than one of yours is at fault. Begin with the first failure above.")


@app.command()
def hint(number: ChapterArgument, which: Annotated[int, typer.Argument(min=1)] = 1) -> None:
    """Give a hint; a higher number says more."""
    hints = _chapter(number).hints
    if which > len(hints):
        raise ConfigError(
            f"Chapter {number} has {len(hints)} hints; `course solution {number}` shows it all."
        )
    print(hints[which - 1].strip())
    more = f"hint {number} {which + 1}" if which < len(hints) else f"solution {number}"
    print(f"\n({which} of {len(hints)}; more: python main.py course {more})", file=sys.stderr)


@app.command()
def diff(number: ChapterArgument, folder: FolderOption = MY_FOLDER) -> None:
    """Show what leads from your definitions to the reference's."""
    print(Workbook(folder).diff(_chapter(number)) or "Yours are the reference's, to the letter.", end="")


@app.command()
def solution(number: ChapterArgument) -> None:
    """Print the reference's definitions."""
    texts = [whole(*in_parts(definition)) for definition in _chapter(number).teaches]
    print("\n\n".join(texts), end="")


@app.command("break")
def break_it(number: ChapterArgument, name: Annotated[str | None, typer.Argument()] = None) -> None:
    """Put one plausible mistake into the reference's code, to see what it does; list them without a name."""
    mutants = {mutant.name: mutant for mutant in _chapter(number).mutants}
    if name is None:
        for mutant in mutants.values():
            print(f"{mutant.name:<24} {mutant.old.strip()}  ->  {mutant.new.strip() or '(nothing)'}")
        return
    if name not in mutants:
        raise ConfigError(f"Chapter {number} has no mistake {name!r}; there are {', '.join(mutants)}.")
    book = Workbook(Path(".cache") / "course" / f"{number}-{name}")
    if not book.written():
        book.add_mutant(mutants[name])
    print(f"Written to {book.folder}. See it: python main.py --course {book.folder}")


def _chapter(number: str) -> Chapter:
    return chapter(read_manifest(), number)


def _warn_of_drift(book: Workbook) -> None:
    for line in book.drifted():
        print(f"warning: {line}", file=sys.stderr)
