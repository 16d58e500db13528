"""Files on the local disk and in object stores.

``local`` writes files atomically, ``directories`` reads and writes object stores,
``location`` parses paths and URIs, ``retry`` repeats transient failures, ``cache`` keeps shards.
"""

from skillnet_files.commit import restore_replaced
from skillnet_platform.storage.local import (
    HOME_VARIABLE,
    archive_root,
    atomic_write,
    commit_directory,
    data_root,
    disk_guard,
    free_bytes,
    human_bytes,
    open_output,
    process_is_alive,
    read_json,
    read_record,
    require_space,
    run_root,
    scratch_directory,
    sha256_file,
    staging_directory,
    write_json,
)
