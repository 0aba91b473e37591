-- Layout 1 of fleetquota's table. A store runs this by itself, unless Options.NoMigrate forbids that: then run it as a user
-- with a right to create tables, and grant the store's user SELECT, INSERT, UPDATE and DELETE on the table. Migration
-- returns it with the name of the table that a store's options give.
--
-- key      the limit and key, or the request id: UTF-8, see convert_from(key, 'UTF8')
-- value    the state; a row whose value is empty counts as absent
-- expires  microseconds since 1970; from then on the row counts as absent, and any process may delete it
--
-- No column that changes has an index, and each page has free space, so that an update is a heap-only one: it touches one
-- page and no index. The comment is the table's version.
CREATE TABLE IF NOT EXISTS "fleetquota" (
	key     bytea PRIMARY KEY,
	value   text COLLATE "C" NOT NULL,
	expires bigint NOT NULL
) WITH (fillfactor = 70);
COMMENT ON TABLE "fleetquota" IS 'fleetquota layout 1';
