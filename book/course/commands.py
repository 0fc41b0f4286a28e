"""Owns ``python main.py course``: what a learner types, and what they read.

Knows neither syntax trees nor pytest.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from book.course.check import crash_site, run_tests, to_blame
from book.course.manifest import Chapter, chapter, read_manifest
from book.course.native import prepare
from book.course.workbook import Workbook, in_parts, module_file, whole
from tiny_llm.errors import ConfigError, did_you_mean

ChapterArgument = Annotated[str, typer.Argument(metavar="CHAPTER", help="Its number, such as 1.1.")]
HereArgument = Annotated[
    str | None, typer.Argument(metavar="[CHAPTER]", help="Its number; without, the one you are at.")
]
TaskArgument = Annotated[str | None, typer.Argument(metavar="[TASK]", help="One function of the chapter.")]
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


@app.command("next")
def what_next(folder: FolderOption = MY_FOLDER) -> None:
    """Say where you are, and what to do now."""
    _say_next(Workbook(folder))


def _say_next(book: Workbook) -> None:
    it = _here(book)
    if it is None:
        print(f"All chapters are done. Serve from your code: python main.py --course {book.folder} serve")
        return
    missing, command = book.stubs(it), "python main.py course"
    print(f"Chapter {it.id}, {it.title}: {book.state(it)}.")
    if book.state(it) == "not begun":
        print(f"Now: {command} start {it.id}, and read book/docs/{it.page} ({it.minutes} minutes).")
    elif not it.teaches:
        print(f"Now: read book/docs/{it.page} ({it.minutes} minutes). Then: {command} check {it.id}")
    elif missing:
        module, name = in_parts(missing[0])
        print(f"Now: write {name} in {module_file(book.folder, module)}; book/docs/{it.page} tells how.")
        print(f"Then: {command} check {it.id} {name}")
    else:
        print(f"Now: {command} check {it.id}")


def _here(book: Workbook) -> Chapter | None:
    """The chapter that the learner is at: the last one touched, or the next after it that is not done."""
    chapters = list(read_manifest().values())
    at = next((n for n, it in enumerate(chapters) if it.id == book.at()), 0)
    return next((it for it in (*chapters[at:], *chapters[:at]) if book.state(it) != "done"), None)


@app.command()
def start(number: HereArgument = None, folder: FolderOption = MY_FOLDER) -> None:
    """Write what the chapter has you fill in; nothing of yours is overwritten."""
    book = Workbook(folder)
    it = _chapter(number, book)
    new, kept = book.start(it)
    for definition in (*new, *kept):
        module, name = in_parts(definition)
        print(f"{'written' if definition in new else 'kept':<8} {module_file(folder, module)}: {name}")
    _warn_of_drift(book)
    fill = "fill them in, " if it.teaches else ""
    print(f"Read book/docs/{it.page}, {fill}then: python main.py course check {it.id}")
    if len(it.teaches) > 1:
        print(f"Or one at a time: python main.py course check {it.id} {in_parts(it.teaches[0])[1]}")


@app.command()
def check(
    number: HereArgument = None,
    task: TaskArgument = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All chapters that you have written, in one go.")
    ] = False,
    folder: FolderOption = MY_FOLDER,
) -> None:
    """Run the chapter's tests on your code, and find what is to blame when they fail.

    With a task, the reference stands in for the chapter's others.
    """
    book = Workbook(folder)
    _warn_of_drift(book)
    if everything:
        _check_all(book)
        return
    it = _chapter(number, book)
    asked = it.teaches if task is None else [_task(it, task)]
    missing = [definition for definition in book.stubs(it) if definition in asked]
    if missing:
        names = ", ".join(in_parts(definition)[1] for definition in missing)
        todo = "" if book.state(it) != "not begun" else f" (python main.py course start {it.id} makes a file)"
        raise ConfigError(f"Chapter {it.id}: still to be written in {folder}: {names}{todo}.")
    book.be_at(it)
    others = [definition for definition in it.teaches if definition not in asked]
    written = [definition for definition in book.written() if definition not in others]
    mine = ", ".join(in_parts(definition)[1] for definition in written) or "nothing yet"
    print(f"Yours: {mine}. All else: the reference.")
    if _red([it], book, others):
        _blame(it, book, written, others)
        raise typer.Exit(1)
    if task is not None:
        print(f"{in_parts(asked[0])[1]} is right, by the tests of chapter {it.id}.")
    else:
        book.mark_done(it)
        print(f"Chapter {it.id} is done.")
    _say_next(book)


def _check_all(book: Workbook) -> None:
    ready = [it for it in read_manifest().values() if it.teaches and not book.stubs(it)]
    if not ready:
        raise ConfigError(f"No chapter is written in {book.folder}; `course next` says where to begin.")
    print(f"Chapters {', '.join(it.id for it in ready)}, all at once.")
    with_cpp = [it for it in ready if any(definition.startswith("kernels/cpu") for definition in it.teaches)]
    # C++ runs in place of Python that other chapters ask for: those are looked at without it.
    parts = [[it for it in ready if it not in with_cpp], with_cpp]
    red = [_red(part, book, []) for part in parts if part]
    if any(red):
        print("Of which chapter is it? `course check` of that one says what is to blame.")
        raise typer.Exit(1)
    for it in ready:
        book.mark_done(it)
    print(f"{len(ready)} chapters are done.")
    _say_next(book)


def _red(chapters: Sequence[Chapter], book: Workbook, without: Sequence[str]) -> bool:
    """Run the tests and show what they say; whether one failed. Raises ConfigError if they did not run."""
    for file in book.kernels():
        prepare(file, book.folder)
    done = run_tests(chapters, book.folder, without=without)
    print(done.stdout.strip() or done.stderr.strip())
    _refuse_broken(done)
    return done.returncode != 0


def _refuse_broken(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ConfigError(f"Your code crashed ({name}). {crash_site(done.stderr)}{_CRASHES.get(name, '')}")
    if done.returncode > 1:
        raise ConfigError("The tests could not start; what stands above says why.")


def _blame(it: Chapter, book: Workbook, written: Sequence[str], without: Sequence[str]) -> None:
    if len(written) == 1:
        print(f"The fault is in {in_parts(written[0])[1]}, the one definition that is yours.")
        return
    if not written:
        print("None of it is yours: what the page says is not what the project says now.")
        return
    print("Which definition is to blame? Trying the reference for each of yours ...")
    guilty = list(to_blame(it, book.folder, written, without))
    for definition in guilty:
        own = next((c.id for c in read_manifest().values() if definition in c.teaches), None)
        where = "this chapter" if definition in it.teaches else f"chapter {own}" if own else "no chapter"
        module, name = in_parts(definition)
        print(f"The fault is in {name} ({where}), {module_file(book.folder, module)}: with ours they pass.")
    if not guilty:
        print("No single one: more than one of yours is at fault. Begin with the first failure above.")


@app.command()
def hint(
    number: HereArgument = None,
    task: TaskArgument = None,
    which: Annotated[int, typer.Argument(min=1, help="A higher number says more.")] = 1,
    folder: FolderOption = MY_FOLDER,
) -> None:
    """Give a hint for a task: the first that you have not written, or the one you name."""
    book = Workbook(folder)
    it = _taught(number, book)
    name = in_parts(_task(it, task) if task else [*book.stubs(it), it.teaches[0]][0])[1]
    hints = it.hints[name]
    if which > len(hints):
        raise ConfigError(f"{name} has {len(hints)} hints; `course solution {it.id} {name}` shows it all.")
    print(f"{name}\n\n{hints[which - 1].strip()}")
    more = f"hint {it.id} {name} {which + 1}" if which < len(hints) else f"solution {it.id} {name}"
    print(f"\n({which} of {len(hints)}; more: python main.py course {more})", file=sys.stderr)


@app.command()
def diff(number: HereArgument = None, folder: FolderOption = MY_FOLDER) -> None:
    """Show what leads from your definitions to the reference's."""
    book = Workbook(folder)
    print(book.diff(_taught(number, book)) or "Yours are the reference's, to the letter.", end="")


@app.command()
def solution(
    number: HereArgument = None, task: TaskArgument = None, folder: FolderOption = MY_FOLDER
) -> None:
    """Print the reference's definitions, or that of one task."""
    it = _taught(number, Workbook(folder))
    wanted = it.teaches if task is None else [_task(it, task)]
    print("\n\n".join(whole(*in_parts(definition)) for definition in wanted), end="")


@app.command("break")
def break_it(
    number: ChapterArgument,
    name: Annotated[str | None, typer.Argument()] = None,
    code: Annotated[bool, typer.Option("--code", help="Show what was changed, too.")] = False,
) -> None:
    """Put one plausible mistake into the reference's code, to see what it does; list them without a name.

    You read what it does to a model. Guess where it is before you ask for --code.
    """
    it = _taught(number)
    mutants = {mutant.name: mutant for mutant in it.mutants}
    if name is not None and name not in mutants:
        near = did_you_mean(name, mutants)
        raise ConfigError(f"Chapter {it.id} has no mistake {name!r}; there are {', '.join(mutants)}.{near}")
    for mutant in mutants.values() if name is None else [mutants[name]]:
        print(f"{mutant.name:<28} {mutant.symptom}")
        if code:
            changed = f"{mutant.old.strip()}  ->  {mutant.new.strip() or '(nothing)'}"
            print(f"{'':<28} {in_parts(mutant.definition)[1]}: {changed}")
    if name is not None:
        book = Workbook(Path(".cache") / "course" / f"{it.id}-{name}")
        if not book.written():
            book.add_mutant(mutants[name])
        print(f"Written to {book.folder}. See it: python main.py --course {book.folder}")


def _chapter(number: str | None, book: Workbook | None = None) -> Chapter:
    if number is not None:
        return chapter(read_manifest(), number)
    it = _here(book) if book is not None else None
    if it is None:
        raise ConfigError("All chapters are done: say the number of the one that you mean.")
    return it


def _taught(number: str | None, book: Workbook | None = None) -> Chapter:
    """The same, if there is something to write."""
    it = _chapter(number, book)
    if not it.teaches:
        raise ConfigError(f"There is nothing to write in chapter {it.id}: read book/docs/{it.page}.")
    return it


def _task(it: Chapter, given: str) -> str:
    """The definition of that name, or with that last part. Raises ConfigError with those that there are."""
    named = [d for d in it.teaches if given in (in_parts(d)[1], in_parts(d)[1].rpartition(".")[2])]
    if not named:
        names = [in_parts(definition)[1] for definition in it.teaches]
        near = did_you_mean(given, names)
        raise ConfigError(f"Chapter {it.id} has no task {given!r}; there are {', '.join(names)}.{near}")
    return named[0]


def _warn_of_drift(book: Workbook) -> None:
    for line in book.drifted():
        print(f"warning: {line}", file=sys.stderr)
