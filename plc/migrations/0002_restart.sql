-- Whether slivers are started again when their machines end: always, on-failure or never.
ALTER TABLE slices ADD COLUMN restart TEXT NOT NULL DEFAULT 'always';
