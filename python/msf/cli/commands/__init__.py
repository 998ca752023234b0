"""The commands of ``msf``: one module each, with ``add_arguments``, ``run`` and ``text``.

``run(args)`` does the work and returns a JSON document; ``text`` turns that into what a person
reads; with "problems" in it the exit status is 1. Nothing here imports torch before ``run``, so
that ``msf --help`` answers at once.
"""

from . import doctor, encode, evaluate, factorize, flops, import_model, inspect, sample, train

COMMANDS = {
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "encode": encode,
    "import": import_model,
    "factorize": factorize,
    "flops": flops,
    "inspect": inspect,
    "doctor": doctor,
}
