-- A journal of schema 1, which later versions read too.
PRAGMA journal_mode = WAL;
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE runs (
    run INTEGER PRIMARY KEY, began REAL NOT NULL, ended REAL, outcome TEXT,
    version TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, python TEXT NOT NULL
);
CREATE TABLE results (
    id INTEGER PRIMARY KEY, agent TEXT NOT NULL, key NOT NULL, n INTEGER NOT NULL,
    run INTEGER NOT NULL, idx INTEGER NOT NULL, agent_id TEXT NOT NULL,
    status TEXT NOT NULL, output, error TEXT,
    retries INTEGER NOT NULL, latency_ms REAL NOT NULL, queue_ms REAL NOT NULL, at REAL NOT NULL,
    written INTEGER NOT NULL, stale INTEGER NOT NULL DEFAULT 0,
    UNIQUE (agent, key, n)
);
PRAGMA application_id = 1634168436;
PRAGMA user_version = 1;

INSERT INTO meta VALUES ('version', '{"model": "x"}'), ('salt', x'000102030405060708090a0b0c0d0e0f');
INSERT INTO runs VALUES (1, 1e9, 1e9, 'completed', '{"model": "x"}', 'host', 1, '3.11.7');
INSERT INTO results VALUES
    (1, 'greeter.greet', x'c0cad68d6ad3c453b9b629f4974f08be', 0, 1, 0, 'greet-0', 'success', '"hello Ada"', NULL, 0, 1.5, 0.5, 1e9, 1, 0),
    (2, 'greeter.greet', x'68e5f80a0d555d0372afae9ce55b68fa', 0, 1, 1, 'greet-1', 'error', NULL, 'ValueError: boom', 3, 2.5, 0.0, 1e9, 1, 0),
    (3, 'greeter.greet', 7, 0, 1, 2, 'c', 'success', '["hello",7]', NULL, 0, 0.5, 0.0, 1e9, 1, 0);
