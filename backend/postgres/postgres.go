package postgres

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// DefaultTable is the name of the table unless Options say another.
const DefaultTable = "fleetquota"

// Options are the options of New. The zero value, and nil, have the defaults.
type Options struct {
	// Schema is the schema of the table, which must exist; "" stands for the first schema of the connection's
	// search_path in which the table is, or can be created. 1 to 63 letters, digits and underscores, the first not a
	// digit. It is quoted, so upper and lower case differ.
	Schema string
	// Table is the name of the table; "" stands for DefaultTable. The same characters as for Schema. Stores on one table
	// share its quotas.
	Table string
	// NoMigrate forbids the store to create the table: where it is missing, calls fail with quota.ErrMisconfigured.
	// Migration returns the SQL that makes it. The zero value lets the store create it, which takes a right to
	// CREATE in the schema.
	NoMigrate bool
	// Clock replaces the server's time, for tests; nil stands for the server's time.
	Clock func() time.Time
}

var identifier = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,62}$`)

// name returns the quoted name of the table.
func (o *Options) name() (string, error) {
	table := o.Table
	if table == "" {
		table = DefaultTable
	}
	const accepted = "accepted: 1 to 63 letters, digits and underscores, the first not a digit"
	if !identifier.MatchString(table) {
		return "", invalid("Options.Table is %.70q; %s", table, accepted)
	}
	if o.Schema == "" {
		return pgx.Identifier{table}.Sanitize(), nil
	}
	if !identifier.MatchString(o.Schema) {
		return "", invalid("Options.Schema is %.70q; %s", o.Schema, accepted)
	}
	return pgx.Identifier{o.Schema, table}.Sanitize(), nil
}

// Migration returns the SQL that creates the table of a store with these options, for programs that may not create
// it themselves, see Options.NoMigrate. It changes nothing where the table exists. It fails with quota.ErrInvalid
// where New does.
func Migration(o *Options) (string, error) {
	if o == nil {
		o = &Options{}
	}
	name, err := o.name()
	if err != nil {
		return "", err
	}
	return strings.ReplaceAll(migration, `"`+DefaultTable+`"`, name), nil
}

// Store is a quota.Store in a PostgreSQL table. Any list of charges is decided in one transaction. Methods may be called
// concurrently.
type Store struct {
	database *database
	inner    quota.Store
}

var (
	_ quota.Store           = (*Store)(nil)
	_ driver.HealthReporter = (*Store)(nil)
	_ driver.Prompt         = (*Store)(nil)
	_ driver.Wrapper        = (*Store)(nil)
	_ driver.Measured       = (*Store)(nil)
)

// New returns a store that uses a pool, which stays the caller's: Close does not close it. The pool may serve other work
// too. New sends nothing, so it works while the server is down. It fails with quota.ErrInvalid where the pool is nil or
// an option is not accepted.
func New(pool *pgxpool.Pool, o *Options) (*Store, error) {
	if pool == nil {
		return nil, invalid("pool is nil; accepted: a pool of pgxpool.New")
	}
	return newStore(pool, nil, o)
}

// newStore makes a store, whose sockets are those of its own pool, or nil where the pool is not its own.
func newStore(pool *pgxpool.Pool, own *sockets, o *Options) (*Store, error) {
	if o == nil {
		o = &Options{}
	}
	name, err := o.name()
	if err != nil {
		return nil, err
	}
	d := &database{pool: pool, own: own, name: name, statements: newStatements(name), noMigrate: o.NoMigrate, clock: o.Clock}
	d.life, d.end = context.WithCancel(context.Background())
	if d.migration, err = Migration(o); err != nil {
		return nil, err
	}
	// A pool that is told not to prepare statements is most likely one of a proxy.
	d.unnamed.Store(pool.Config().ConnConfig.DefaultQueryExecMode != pgx.QueryExecModeCacheStatement)
	inner, err := driver.NewTransactional(d, nil)
	if err != nil {
		return nil, err
	}
	return &Store{d, inner}, nil
}

// Charge decides one charge.
func (s *Store) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	return s.inner.Charge(ctx, c)
}

// ChargeAll decides a list of charges in one transaction and writes a decision for each to out.
func (s *Store) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	return s.inner.ChargeAll(ctx, cs, out)
}

// Close closes the store, and the pool if the store made it. It gives calls in flight on its own pool a second to
// end, and then cuts their connections. Calls on a pool of the caller's end by their context.
func (s *Store) Close() error { return s.inner.Close() }

// Prompt reports true: a call returns by its context's deadline.
func (s *Store) Prompt() bool { return true }

// Unwrap returns the store that decides, for driver.Find.
func (s *Store) Unwrap() quota.Store { return s.inner }

// Health asks the server for its version. It fails with quota.ErrUnavailable where the server is a standby, which
// takes no charges.
func (s *Store) Health(ctx context.Context) (driver.Health, error) {
	h, err := s.database.health(ctx)
	if err == nil {
		s.database.seen.Store(&h)
	}
	return h, err
}

// Readings tells the expired rows that this store removed, and the numbers of the last Health; the store that Unwrap returns tells the
// transactions. See driver.Measured.
func (s *Store) Readings(tell func(driver.Reading)) {
	tell(driver.Reading{Metric: driver.MetricSweptKeys, Value: s.database.swept.Load()})
	s.database.seen.Load().Readings(tell)
}

// database is the driver.Transactor.
type database struct {
	pool       *pgxpool.Pool
	own        *sockets // nil: the pool is the caller's
	name       string   // quoted
	statements statements
	migration  string
	noMigrate  bool
	clock      func() time.Time

	unnamed atomic.Bool   // statements are not prepared
	written atomic.Uint64 // rows, for the sweeps
	swept   atomic.Int64  // rows
	seen    atomic.Pointer[driver.Health]
	life    context.Context
	end     context.CancelFunc // of life

	mu      sync.Mutex
	ready   bool     // the table is there
	current *attempt // at making it ready, or nil
	wg      sync.WaitGroup
	closed  bool
}

// Close ends the store's goroutines, and its own pool.
func (d *database) Close() error {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.end()
	d.wg.Wait()
	if d.own == nil {
		return nil
	}
	done := make(chan struct{})
	go func() {
		d.pool.Close()
		close(done)
	}()
	const patience = time.Second
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		d.own.close()
		<-done
	}
	return nil
}

// acquire returns a connection, once the table is ready.
func (d *database) acquire(ctx context.Context) (*pgxpool.Conn, error) {
	if err := d.makeReady(ctx); err != nil {
		return nil, err
	}
	return d.connect(ctx)
}

func (d *database) connect(ctx context.Context) (*pgxpool.Conn, error) {
	conn, err := d.pool.Acquire(ctx)
	if err != nil {
		return nil, d.notConnected(ctx, err)
	}
	return conn, nil
}

// health asks the server how it is.
func (d *database) health(ctx context.Context) (driver.Health, error) {
	if err := ctx.Err(); err != nil {
		return driver.Health{}, err
	}
	conn, err := d.connect(ctx)
	if err != nil {
		return driver.Health{}, err
	}
	defer conn.Release()
	c := conn.Conn().PgConn()
	results, err := d.send(ctx, c, call{statement: statement{text: "SELECT current_setting('server_version'), pg_is_in_recovery()::text"}})
	if err != nil {
		return driver.Health{}, d.refused(ctx, err)
	}
	if len(results[0].Rows) != 1 || len(results[0].Rows[0]) != 2 {
		return driver.Health{}, fmt.Errorf("postgres: %w: the server's version has %d rows", quota.ErrUnavailable, len(results[0].Rows))
	}
	row := results[0].Rows[0]
	version, _, _ := strings.Cut(string(row[0]), " ")
	if string(row[1]) == "true" {
		return driver.Health{}, fmt.Errorf("postgres: %w: the server is a standby; accepted: the primary", quota.ErrUnavailable)
	}
	return driver.Health{Kind: "postgresql", Version: version}, nil
}
