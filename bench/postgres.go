package main

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/fleetquota/fleetquota/backend/postgres"
	"github.com/fleetquota/fleetquota/internal/pgserver"
)

// launchPostgres starts a server, with PostgreSQL's own settings for durability, for the time of the measurements.
func launchPostgres() (*target, string, func(), error) {
	s, err := pgserver.Launch()
	if err != nil {
		return nil, "", nil, err
	}
	at := &target{postgres: s.URL("postgres") + "&pool_max_conns=16"}
	pool, err := pgxpool.New(context.Background(), at.postgres)
	if err != nil {
		s.Stop()
		return nil, "", nil, err
	}
	defer pool.Close()
	var version string
	if err := pool.QueryRow(context.Background(), "SHOW server_version").Scan(&version); err != nil {
		s.Stop()
		return nil, "", nil, err
	}
	version, _, _ = strings.Cut(version, " ")
	return at, version, s.Stop, nil
}

var tables atomic.Int64

// onPostgres opens a subject with a pool and the name of a table of its own, which it drops at the end. Settings are
// parameters of the URL, such as "&synchronous_commit=off".
func onPostgres(settings string, open func(pool *pgxpool.Pool, table string, n numbers) (take, error)) func(numbers, *target) (take, func(), error) {
	return func(n numbers, at *target) (take, func(), error) {
		pool, err := pgxpool.New(context.Background(), at.postgres+settings)
		if err != nil {
			return nil, nil, err
		}
		table := fmt.Sprint("bench", tables.Add(1))
		t, err := open(pool, table, n)
		return t, func() {
			_, _ = pool.Exec(context.Background(), "DROP TABLE IF EXISTS "+table)
			pool.Close()
		}, err
	}
}

func fleetquotaTake(pool *pgxpool.Pool, table string, n numbers) (take, error) {
	store, err := postgres.New(pool, &postgres.Options{Table: table})
	if err != nil {
		return nil, err
	}
	return throughLimiter(store, n)
}

// naiveTake counts in one statement, UPDATE … WHERE, and in a second one at the first charge to a key, and at a
// denial. It has no window: nothing comes back.
func naiveTake(pool *pgxpool.Pool, table string, n numbers) (take, error) {
	if _, err := pool.Exec(context.Background(), "CREATE TABLE "+table+" (key text PRIMARY KEY, used bigint NOT NULL)"); err != nil {
		return nil, err
	}
	return func(ctx context.Context, key string) (bool, error) {
		tag, err := pool.Exec(ctx, "UPDATE "+table+" SET used = used + 1 WHERE key = $1 AND used < $2", key, n.capacity)
		if err == nil && tag.RowsAffected() == 0 {
			tag, err = pool.Exec(ctx, "INSERT INTO "+table+" VALUES ($1, 1) ON CONFLICT DO NOTHING", key)
		}
		return tag.RowsAffected() == 1, err
	}, nil
}

const noWait = "&synchronous_commit=off"

var postgresSubjects = []subject{
	{"fleetquota on postgres", ours, onPostgres("", fleetquotaTake)},
	{"fleetquota on postgres, synchronous_commit=off", ours, onPostgres(noWait, fleetquotaTake)},
	{"UPDATE … WHERE", floor, onPostgres("", naiveTake)},
	{"UPDATE … WHERE, synchronous_commit=off", floor, onPostgres(noWait, naiveTake)},
}
