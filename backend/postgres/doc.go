// Package postgres keeps limits in a table of PostgreSQL 14 or newer, through a pool of pgx connections.
//
//	pool, err := pgxpool.New(ctx, "postgres://app:secret@localhost:5432/app")
//	store, err := postgres.New(pool, nil)
//	limiter, err := quota.NewLimiter(store, limit, nil)
//	decision, err := limiter.Take(ctx, "203.0.113.9", 1)
//
// [backend.Open] opens the same store from a URL, with a pool of its own:
//
//	postgres://app:secret@localhost:5432/app?table=quotas&pool_max_conns=16&sslmode=verify-full
//
// The parameters table, schema and migrate=false are those of [Options]; all parameters of pgxpool.ParseConfig are
// accepted, such as sslmode, target_session_attrs, connect_timeout (here 5 s unless given) and pool_max_conns (pgx's
// default is the number of processors, at least 4), and so are the environment variables of PostgreSQL's clients,
// such as PGPASSWORD. Of the server's settings a URL may set application_name, search_path, synchronous_commit and
// three timeouts by name, and any other by the parameter options.
//
// # How a call is decided
//
// A call reads the rows of its keys and the server's clock in one statement, which takes no lock, and decides. A
// peek and a denial end there: one round trip, and no write. A grant writes in a second round trip, in one statement
// that commits by itself if no row has changed since. If one has, the call begins again in a transaction that locks
// its rows, in the order of their keys, so that it cannot be overtaken: two further round trips. Calls of one
// process that charge the same key share a transaction while one is under way.
//
// Measured against it was a transaction that locks before it reads: it holds the lock for a round trip more, makes
// up to two thirds as many grants on one key, and writes to the table for a denial. A grant in one round trip would
// need the server's time before the server was asked, or every rule a second time, in SQL.
//
// # The table
//
// The store looks for its table at its first call, and creates it if it is missing and Options do not forbid it. Its
// layout has a version, in the table's comment; a table of another release's layout is quota.ErrMisconfigured.
// Migration returns the SQL, which is also in the folder migrations.
//
// No index has a column that an update changes, so updates are heap-only, and autovacuum has little to do. Expired
// rows count as absent at once. Of the rows that a store has written, every sixteenth brings a sweep with it, in the
// same transaction: it looks at eight pages at a random place, deletes up to 64 rows that have expired there, and
// skips rows that another transaction has locked. So the table stays a few percent larger than its living rows, and
// no call pays for a backlog.
//
// The table is logged: a grant that was answered survives a crash of the server, and is on the standbys as far as
// the server's own settings say. Waiting for the disk is most of the time of a grant. The setting
// synchronous_commit=off takes that away: a crash then loses the grants of the last half second or so, which admits
// that much too much once. It is the better trade than an unlogged table, which is as fast, and empty after a crash
// and on a standby; the store works on one all the same.
//
// # Errors
//
// A call whose write was sent and not answered is [quota.ErrIndeterminate], and so is one that was answered by a
// fatal error: the connection's end may have come after the commit. The client library calls some of these safe to
// retry: they are not. Every other error says that no token was charged: quota.ErrConflict for serialization
// failures, deadlocks and lock timeouts (after repetitions), quota.ErrMisconfigured for a wrong password, a missing
// database, table, schema or right, and a TLS name or authority that is refused, quota.ErrUnavailable for the rest:
// statement timeouts, a server that starts, shuts down, has no connection left, or is read-only. A read-only
// server's connection is closed, so that the next call may find the new primary.
//
// # Deadlines
//
// A call returns by its context's deadline. If that comes while a reply is awaited, the connection is closed, and the
// pool makes a new one, which takes a few milliseconds with a password. Timeouts should therefore be rare: several
// times the usual time of a commit.
//
// # Connections and proxies
//
// Statements are prepared once for each connection. Behind a proxy that gives a connection of the server to another
// client after each transaction, such as PgBouncer in the mode transaction, a prepared statement may be missing: the
// store then stops preparing statements, for good, and repeats the call. The parameter default_query_exec_mode=exec
// has it begin so. Without prepared statements, reads take two to three times as much of the server's processor
// time.
//
// A connection that broke while it was idle is replaced within the call that finds it.
package postgres
