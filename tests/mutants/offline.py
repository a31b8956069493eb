"""Mutants of the offline commands: comparing, inspecting, values of tensors, the command line."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

CLI_LIFE = ("tests/unit/test_cli_life.py",)
CLI_PROGRESS = ("tests/unit/test_cli_progress.py",)
CLI_ENDINGS = ("tests/unit/test_cli_endings.py",)
WHOLE_FILE = ("tests/unit/test_whole_file.py",)
DIFFERENCES_OF_NUMBERS = ("tests/unit/test_number_differences.py",)
COMPARING = ("tests/unit/test_comparing.py",)
VALUES_OF_TENSORS = ("tests/unit/test_tensor_values.py",)
CLI_VALUES = ("tests/unit/test_cli_values.py",)
INSPECTING = ("tests/unit/test_inspecting.py",)
CLI_INSPECT = ("tests/unit/test_cli_inspect.py",)
INSPECT_PAGE = ("tests/unit/test_inspect_page.py",)
NUMBERS = "distckpt/number_differences.py"
PAIRS = "distckpt/paired_reading.py"
TENSOR_VALUES = "distckpt/tensor_values.py"

MUTANTS = (
    Mutant(
        "commands: text from disk reaches the terminal as it is",
        "distckpt/cli/output.py",
        'character if character.isprintable() else " " for character in text',
        "character for character in text",
        CLI_LIFE,
    ),
    Mutant(
        "commands: a second signal ends nothing",
        "distckpt/cli/interruption.py",
        "            os._exit(128 + number)\n",
        "            pass\n",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: what a launcher passes on counts as a second signal",
        "distckpt/cli/interruption.py",
        "        elif now - first_at > _SAME_S:\n",
        "        else:\n",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: no signal is heard while they are imported",
        "distckpt/cli/__init__.py",
        "        interrupted = interruption_in(error)\n",
        "        interrupted = None\n",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: an empty path is the current directory",
        "distckpt/cli/running.py",
        "        _check_not_empty(arguments)\n",
        "",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: an ignored signal is heard",
        "distckpt/cli/interruption.py",
        " if signal.getsignal(number) is not signal.SIG_IGN]",
        "]",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: a full disk below standard output is no error",
        "distckpt/cli/running.py",
        "        _print_text(_message(error))\n        code = NOT_DONE\n",
        "        code = 0\n",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: a closed stream is taken by the next file",
        "distckpt/cli/running.py",
        "        if getattr(sys, name) is None:\n",
        "        if False:\n",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: an error writes to the terminal what was read",
        "distckpt/cli/running.py",
        "{harmless_text(message)}",
        "{message}",
        CLI_ENDINGS,
    ),
    Mutant(
        "commands: an interrupted import is a failed one",
        "distckpt/cli/interruption.py",
        "    while error is not None and not isinstance(error, Interrupted):\n"
        "        error = error.__cause__ or error.__context__\n    return error\n",
        "    return error if isinstance(error, Interrupted) else None\n",
        CLI_ENDINGS,
    ),
    Mutant(
        "cat: a pipe or device is replaced",
        TENSOR_VALUES,
        "    if os.path.exists(path) and not os.path.isfile(path):\n",
        "    if False:\n",
        VALUES_OF_TENSORS,
    ),
    Mutant(
        "diff: nothing is equal to nothing",
        "distckpt/comparing.py",
        "    for glob in unmatched_globs((*select, *drop), known):\n",
        "    for glob in ():\n",
        COMPARING,
    ),
    Mutant(
        "commands: a file that is not finished takes its place",
        "distckpt/cli/whole_file.py",
        "        yield temporary\n        os.replace(temporary, path)\n    except",
        "        os.rename(path, temporary) if path.exists() else temporary.touch()\n        temporary.rename(path)\n"
        "        yield path\n    except",
        WHOLE_FILE,
    ),
    Mutant(
        "commands: half of a file stays",
        "distckpt/cli/whole_file.py",
        "            temporary.unlink()\n",
        "            pass\n",
        WHOLE_FILE,
    ),
    Mutant(
        "commands: steps of several threads are lost",
        "distckpt/cli/output.py",
        "        with self._lock:\n            self._bytes += step\n",
        "        before = self._bytes\n        time.sleep(0)\n        self._bytes = before + step\n",
        CLI_PROGRESS,
    ),
    Mutant(
        "diff: integers of 64 bits are subtracted as float64",
        NUMBERS,
        "            distance, largest = _integers_apart(x, y)\n",
        "            pass\n",
        DIFFERENCES_OF_NUMBERS,
    ),
    Mutant(
        "diff: a NaN is within the tolerance",
        NUMBERS,
        "outside = is_nan | np.isinf(distance)",
        "outside = np.isinf(distance)",
        DIFFERENCES_OF_NUMBERS,
    ),
    Mutant(
        "diff: an infinity is within the tolerance",
        NUMBERS,
        "outside = is_nan | np.isinf(distance) | (distance > limit)",
        "outside = is_nan | ~(distance <= tolerance.atol + tolerance.rtol * size)",
        DIFFERENCES_OF_NUMBERS,
    ),
    Mutant(
        "diff: damage is a difference like others",
        "distckpt/cli/diff.py",
        "    if not report.is_complete:\n",
        "    if False:\n",
        CLI_VALUES,
    ),
    Mutant(
        "diff: a step is read over the one that is compared",
        PAIRS,
        "memory = memories[number % 2]",
        "memory = memories[0]",
        COMPARING,
    ),
    Mutant(
        "diff: what cannot be read ends the others of its step",
        PAIRS,
        "            source.fill([one])\n",
        "            raise error\n",
        COMPARING,
    ),
    Mutant(
        "diff: a tensor is ended at every band that cannot be read",
        PAIRS,
        "                self._failed.add(part.key)\n",
        "",
        COMPARING,
    ),
    Mutant(
        "diff: a checkpoint that was removed is called damaged",
        "distckpt/comparing.py",
        "    if not is_complete:\n",
        "    if False:\n",
        COMPARING,
    ),
    Mutant(
        "diff: a per-rank value that one side lacks",
        "distckpt/comparing.py",
        "            if has_same_axes or _NO_FILE not in files:\n",
        "            if _NO_FILE not in files:\n",
        COMPARING,
    ),
    Mutant(
        "cat: squares overflow",
        "distckpt/moments.py",
        "    if unit > moments.unit:\n",
        "    unit = 1.0\n    if unit > moments.unit:\n",
        ("tests/unit/test_moments.py",),
    ),
    Mutant(
        "cat: a small deviation is lost beside a large mean",
        "distckpt/moments.py",
        "        return math.sqrt(self.spread_units / self.finite) * self.unit if self.finite else None\n",
        "        return math.sqrt(abs(self.squares_units / self.finite - self.mean_units**2)) * self.unit "
        "if self.finite else None\n",
        ("tests/unit/test_moments.py",),
    ),
    Mutant(
        "cat: a file has its name before it is durable",
        TENSOR_VALUES,
        "            os.fsync(out.fileno())\n",
        "",
        VALUES_OF_TENSORS,
    ),
    Mutant(
        "cat: the name of a file is not durable",
        TENSOR_VALUES,
        "        sync_directory(os.path.dirname(os.path.abspath(path)))\n",
        "        pass\n",
        VALUES_OF_TENSORS,
    ),
    Mutant(
        "cat: writes over what was made meanwhile",
        TENSOR_VALUES,
        "            os.link(temporary, path)  # Fails if somebody has made it meanwhile.\n",
        "            os.replace(temporary, path)\n            return\n",
        VALUES_OF_TENSORS,
    ),
    Mutant(
        "cat: leaves a half-written file",
        TENSOR_VALUES,
        "            os.unlink(temporary)\n        raise\n",
        "            pass\n        raise\n",
        VALUES_OF_TENSORS,
    ),
    Mutant(
        "inspect: data in the page can end its element",
        "distckpt/cli/inspect_page.py",
        '    for character in "<>&\\u2028\\u2029":\n',
        "    for character in ():\n",
        INSPECT_PAGE,
    ),
    Mutant(
        "inspect: the page runs any script",
        "distckpt/cli/inspect_page.py",
        "script-src {_hash(script)}",
        "script-src 'unsafe-inline'",
        INSPECT_PAGE,
    ),
    Mutant(
        "inspect: the title of the page is markup",
        "distckpt/cli/inspect_page.py",
        'escape(str(data["title"]))',
        'str(data["title"])',
        INSPECT_PAGE,
    ),
    Mutant(
        "inspect: a page as large as it comes",
        "distckpt/cli/inspect_page.py",
        "            if self._numbers + numbers > _MAX_NUMBERS:\n",
        "            if False:\n",
        INSPECT_PAGE,
    ),
    Mutant(
        "inspect: chunks where none can lie",
        "distckpt/inspecting.py",
        "            check_locations(index, keys, copies.target, copies.hits)\n",
        "",
        INSPECTING,
    ),
    Mutant(
        "inspect: all chunks at a time",
        "distckpt/inspecting.py",
        "        if batch and record_bytes + size > _BATCH_BYTES:\n",
        "        if False:\n",
        INSPECTING,
    ),
    Mutant(
        "inspect: damage is not told by the exit code",
        "distckpt/cli/inspect.py",
        "return DAMAGED if any(one.damage is not None for one in entries) else 0",
        "return 0",
        CLI_INSPECT,
    ),
    Mutant(
        "inspect: what is removed meanwhile is damaged",
        "distckpt/cli/inspect.py",
        "        if commit not in list_commits(storage):\n",
        "        if False:\n",
        CLI_INSPECT,
    ),
    Mutant(
        "inspect: values give orders to a terminal",
        "distckpt/cli/inspect_text.py",
        "{plain_text(_json_text(value.value))}",
        "{_json_text(value.value)}",
        CLI_INSPECT,
    ),
    Mutant(
        "inspect: keys give orders to a terminal",
        "distckpt/cli/inspect_text.py",
        "            shown(tensor.key),\n",
        "            tensor.key,\n",
        CLI_INSPECT,
    ),
)
