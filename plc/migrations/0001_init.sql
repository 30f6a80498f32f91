-- PLC's database. Times are milliseconds since 1970 UTC. Numbers ending in _share are thousandths of a share.
CREATE TABLE sites (
    name    TEXT PRIMARY KEY,
    shares  INTEGER NOT NULL CHECK (shares > 0),
    created INTEGER NOT NULL
) STRICT;

CREATE TABLE principals (
    name       TEXT PRIMARY KEY,
    site       TEXT REFERENCES sites (name),
    is_admin   INTEGER NOT NULL,
    is_pi      INTEGER NOT NULL,
    is_user    INTEGER NOT NULL,
    key_sha256 TEXT NOT NULL UNIQUE,
    created    INTEGER NOT NULL
) STRICT;

CREATE TABLE ssh_keys (
    principal TEXT NOT NULL REFERENCES principals (name) ON DELETE CASCADE,
    id        TEXT NOT NULL,
    line      TEXT NOT NULL,
    PRIMARY KEY (principal, id)
) STRICT;

CREATE TABLE nodes (
    id              TEXT PRIMARY KEY,
    site            TEXT NOT NULL REFERENCES sites (name),
    hostname        TEXT NOT NULL UNIQUE,
    key_sha256      TEXT NOT NULL UNIQUE,
    -- Grows with each change of what the node should run.
    revision        INTEGER NOT NULL,
    created         INTEGER NOT NULL,
    boot_at         INTEGER,
    boot_release    TEXT,
    boot_facts      TEXT,
    status_at       INTEGER,
    status_revision INTEGER,
    status_address  TEXT,
    status_host_key TEXT,
    status_version  TEXT
) STRICT;

CREATE TABLE slices (
    name         TEXT PRIMARY KEY,
    site         TEXT NOT NULL REFERENCES sites (name),
    -- Grows with each change of the slice or of a report about one of its slivers.
    revision     INTEGER NOT NULL,
    created      INTEGER NOT NULL,
    boot_script  TEXT NOT NULL,
    base         TEXT NOT NULL,
    es_slice     TEXT,
    -- What set_resources said; all NULL before.
    share        INTEGER,
    ends         INTEGER,
    memory_mib   INTEGER,
    disk_mib     INTEGER,
    ports        TEXT,
    privileges   TEXT NOT NULL,
    -- When instantiate_slice was first called; NULL before.
    instantiated INTEGER,
    -- What nodes are told. Not NULL exactly while the slice is active; kept so by `settle`.
    rspec_share  INTEGER
) STRICT;
CREATE INDEX slices_by_site ON slices (site);
CREATE INDEX slices_by_end ON slices (ends) WHERE rspec_share IS NOT NULL;

CREATE TABLE slice_owners (
    slice     TEXT NOT NULL REFERENCES slices (name) ON DELETE CASCADE,
    principal TEXT NOT NULL REFERENCES principals (name) ON DELETE CASCADE,
    PRIMARY KEY (slice, principal)
) STRICT;
CREATE INDEX slice_owners_by_principal ON slice_owners (principal);

CREATE TABLE slice_nodes (
    slice  TEXT NOT NULL REFERENCES slices (name) ON DELETE CASCADE,
    node   TEXT NOT NULL REFERENCES nodes (id) ON DELETE CASCADE,
    -- The node's revision that brought the last change of this sliver.
    wanted INTEGER NOT NULL,
    PRIMARY KEY (slice, node)
) STRICT;
CREATE INDEX slice_nodes_by_node ON slice_nodes (node);

-- What nodes last reported, also of slivers that are no longer wanted.
CREATE TABLE reports (
    node   TEXT NOT NULL REFERENCES nodes (id) ON DELETE CASCADE,
    slice  TEXT NOT NULL,
    report TEXT NOT NULL,
    PRIMARY KEY (node, slice)
) STRICT;

-- The current boot script: one row or none.
CREATE TABLE boot_script (
    only        INTEGER PRIMARY KEY CHECK (only = 1),
    script      BLOB NOT NULL,
    signature   BLOB NOT NULL,
    offline_key BLOB NOT NULL,
    release     TEXT NOT NULL,
    sha256      TEXT NOT NULL,
    published   INTEGER NOT NULL
) STRICT;
