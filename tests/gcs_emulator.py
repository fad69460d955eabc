"""Google's object store with an empty bucket named ``bucket``, in a process of its own: ``python gcs_emulator.py PORT``.

pyarrow's client would wait forever for a server in its own process.
"""

from __future__ import annotations

import sys
from functools import partial
from http.server import ThreadingHTTPServer

from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

if __name__ == "__main__":
    storage = Storage(use_memory_fs=True)
    create_bucket("bucket", storage)
    # The emulator's own server answers one connection at a time.
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), partial(RequestHandler, storage)).serve_forever()
