"""``skillnet init-task``: write the configuration that trains a corpus' task."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import aliased_field, positional_field
from skillnet_platform.errors import UserError


@dataclass
class InitTaskConfig:
    """Options of ``skillnet init-task``.

    Args:
        path: prepared corpus, its name, or a directory, file or URI of your own data; see
            skillnet inspect.
        name: name of the task; null takes the usual one, such as image_classification.
        file: configuration to write; null takes the name of the corpus, in this directory.
        options: format -> its options for your own data, listed in docs/own-corpora.md.
        init_from: dense run, or checkpoint of transformers or timm (a folder, or ``owner/name`` of
            the Hugging Face hub) to start from; the file then has the settings that it needs.
    """

    path: str = positional_field()
    name: str | None = None
    file: str | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    init_from: str | None = aliased_field(None, "from")


def show_template(result: dict[str, Any]) -> None:
    """Print the written file and the commands that use it."""
    console.print_note(f"{result['file']}: task {result['task']} ({result['objective']})")
    for each in result["commands"]:
        console.print_note(f"next: {each}")


@command(
    InitTaskConfig,
    description="Write a configuration that trains the task of a prepared corpus, or of a "
    "directory of your own data, with its plan and input sizes. The number of classes or symbols "
    "comes from the manifest of the corpus. Nothing is prepared.",
    example="skillnet init-task /data/photos --file photos.yaml\n"
    "skillnet init-task /data/films --options.folder.task values\n"
    "skillnet init-task headings --name topic\n"
    "skillnet init-task headings --from google-bert/bert-base-chinese",
    show=show_template,
)
def main(config: InitTaskConfig) -> dict[str, Any]:
    """Run ``skillnet init-task``."""
    # Decoders load here, so that --help stays fast.
    from pipelines.data.preprocessing.task_template import describe_task, name_file
    from skillnet_platform.storage import open_output

    file = Path(config.file or name_file(config.path))
    if file.exists():
        raise UserError(f"{file}: exists already. Give another --file, or remove it")
    template = describe_task(config.path, config.name, str(file), config.options)
    if config.init_from is not None:
        from pipelines.training.loop.init_from import list_weight_readers

        readers = list_weight_readers()
        if not readers:
            raise UserError("--from: no installed package starts a task from weights; leave it out")
        for reader in readers:
            template = reader.complete_template(template, config.init_from)
    with open_output(file, "w") as stream:
        stream.write(template.to_yaml())
    return {
        "file": str(file),
        "task": template.name,
        "objective": template.objective,
        "corpus": template.corpus,
        "commands": list(template.commands),
    }


if __name__ == "__main__":
    raise SystemExit(main())
