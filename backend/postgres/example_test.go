package postgres_test

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/fleetquota/fleetquota/backend/postgres"
)

// A store shares the program's pool of connections.
func ExampleNew() {
	pool, err := pgxpool.New(context.Background(), "postgres://app@localhost:5432/app")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer pool.Close()
	store, err := postgres.New(pool, &postgres.Options{Table: "quotas"})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer store.Close()
	fmt.Println(store.Prompt())
	// Output: true
}

// An operator runs the SQL where programs may not create tables.
func ExampleMigration() {
	sql, err := postgres.Migration(&postgres.Options{Schema: "limits", Table: "quotas", NoMigrate: true})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(sql[strings.Index(sql, "CREATE"):])
	// Output:
	// CREATE TABLE IF NOT EXISTS "limits"."quotas" (
	// 	key     bytea PRIMARY KEY,
	// 	value   text COLLATE "C" NOT NULL,
	// 	expires bigint NOT NULL
	// ) WITH (fillfactor = 70);
	// COMMENT ON TABLE "limits"."quotas" IS 'fleetquota layout 1';
}
