"""Upload an exported folder to the Hugging Face hub with huggingface_hub, which takes seconds to import."""

from collections.abc import Collection
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from lit_clip.errors import InputError, listed, require
from lit_clip.tools.reading import first_line

HUBS_OWN = ".gitattributes"  # the hub makes it with the repository
LOGIN = "run hf auth login"


class Repository(NamedTuple):
    """A model repository ``org/name`` on the hub, in its state at the time of the look-up."""

    name: str
    private: bool  # whether it is, or for a new one shall be, seen by its owners only
    commit: str | None  # the newest; None if the repository does not exist
    files: frozenset[str]

    def check(self, names: Collection[str], card: str) -> None:
        """Raise :class:`InputError` if the hub refuses the model card, or other files would remain there."""
        from huggingface_hub import ModelCard

        others = listed(sorted(self.files - {*names, HUBS_OWN}))
        problem = f"holds other files than this format's ({others}); name another repository; nothing was written, "
        require(not others, f"--push {self.name}: {problem}uploaded or deleted")
        try:
            ModelCard(card).validate()
        except Exception as error:  # of the hub, or of the library that speaks HTTP
            raise _refusal(self.name, error, "the hub refuses the model card", "nothing was written") from error


def find_repository(name: str, private: bool) -> Repository:
    """Look up ``org/name``, which may not exist yet, before anything is computed."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    require(name.count("/") == 1, f"--push {name}: must be a repository on the hub, org/name")
    require(get_token() is not None, f"--push {name}: no token of the hub; {LOGIN}")
    try:
        info = HfApi().model_info(name)
    except HFValidationError as error:
        raise InputError(f"--push {name}: not a name of a repository ({first_line(error)})") from error
    except RepositoryNotFoundError:
        return Repository(name, private, None, frozenset())
    except Exception as error:  # of the hub, or of the library that speaks HTTP
        raise _refusal(name, error, "cannot be looked up", "nothing was written") from error
    advice = "change it in its settings on the hub, or name another"
    require(info.private or not private, f"--push {name}: is public, and --private is for new repositories; {advice}")
    return Repository(name, bool(info.private), info.sha, frozenset(file.rfilename for file in info.siblings or ()))


def upload(folder: Path, repository: Repository) -> str:
    """Upload a folder, to a new repository if none exists, and return its address.

    It is one commit: the repository gets all files or none. Files of the same name are replaced in its newest version;
    none is deleted. Ctrl-C is raised again with a message that says how to go on.
    """
    from huggingface_hub import HfApi

    api, name = HfApi(), repository.name
    again = f"the export is complete in {folder}: hf upload {name} {quote(str(folder))} . uploads it"
    if repository.private and repository.commit is None:
        again += ", with --private"
    try:
        if repository.commit is None:
            api.create_repo(name, private=repository.private or None)  # None: the organization's default
        what = {"commit_message": "Upload by lit-clip export", "parent_commit": repository.commit}
        done = api.upload_folder(repo_id=name, folder_path=folder, **what)
    except Exception as error:  # of the hub, or of the library that speaks HTTP
        raise _refusal(name, error, "the upload failed", again) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"--push {name}: the upload is not complete; {again}") from None
    return str(done.repo_url)


def _refusal(name: str, error: Exception, what: str, left: str) -> InputError:
    cause: BaseException = error  # an upload's error names the file, its cause the reason
    while getattr(cause, "response", None) is None and (below := cause.__cause__ or cause.__context__) is not None:
        cause = below
    status = getattr(getattr(cause, "response", None), "status_code", None)
    advice = {
        401: f"the hub does not accept your token; {LOGIN}",
        403: f"your token may not write there; {LOGIN} with a token that may, or name a repository of your own",
        409: "exists, but your token may not see it, or it was made just now; name another",
        412: "has changed meanwhile; look at it and upload again",
    }.get(status or 0, f"{what} ({first_line(cause)})")
    return InputError(f"--push {name}: {advice}; {left}")
