package postgres

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/puddle/v2"

	"github.com/fleetquota/fleetquota/quota"
)

// refused returns the error of a call whose statements, if they were executed, were rolled back or wrote no row.
func (d *database) refused(ctx context.Context, err error) error {
	switch server := (*pgconn.PgError)(nil); {
	case errors.As(err, &server):
		return d.answered(server)
	case ctx.Err() != nil:
		return fmt.Errorf("postgres: %w: %w", quota.ErrUnavailable, ctx.Err())
	}
	return fmt.Errorf("postgres: %w: %w", quota.ErrUnavailable, err)
}

// unanswered returns the error of a call whose statements would have committed a charge. Only the server's own word
// says that they did not: pgconn.SafeToRetry, which also reports true where the connection was lost before the
// reply, does not.
func (d *database) unanswered(ctx context.Context, err error) error {
	server := (*pgconn.PgError)(nil)
	switch {
	case errors.As(err, new(notSent)):
		return d.refused(ctx, err)
	case errors.As(err, &server) && rolledBack(server):
		return d.answered(server)
	case ctx.Err() != nil:
		err = fmt.Errorf("%w: %w", ctx.Err(), err)
	}
	return fmt.Errorf("postgres: %w: %w", quota.ErrIndeterminate, err)
}

// rolledBack reports whether an error says that the transaction has no effect. A fatal error may come after the commit,
// and so may an error of a connection, which proxies send.
func rolledBack(e *pgconn.PgError) bool {
	severity := e.SeverityUnlocalized
	if severity == "" { // a proxy
		severity = e.Severity
	}
	return severity == "ERROR" && !strings.HasPrefix(e.Code, "08") && e.Code != completionUnknown
}

// SQLSTATEs.
const (
	completionUnknown = "40003"
	readOnly          = "25006"
	undefinedTable    = "42P01"
	noRight           = "42501"
	noStatement       = "26000"
	statementTwice    = "42P05"
	badText           = "22P02"
	lockTimeout       = "55P03"
	lockTaken         = "55006"
	noDatabase        = "3D000"
	noSchema          = "3F000"
)

// class returns the error of package quota for an answer that says that no charge was committed.
func class(code string) error {
	switch code[:min(len(code), 2)] {
	case "40": // serialization failures, deadlocks
		return quota.ErrConflict
	case "28", "3D", "3F", "42", "0A": // login, database, schema, statement or right, feature
		return quota.ErrMisconfigured
	}
	if code == lockTimeout {
		return quota.ErrConflict
	}
	return quota.ErrUnavailable
}

// answered returns the error for an answer of the server that says that no charge was committed.
func (d *database) answered(e *pgconn.PgError) error {
	cure := ""
	switch {
	case strings.HasPrefix(e.Code, "28"):
		// The server's own text names the user.
		return fmt.Errorf("postgres: %w: the server refuses the user or the password (SQLSTATE %s); accepted: a user that pg_hba.conf lets in, with its password",
			quota.ErrMisconfigured, e.Code)
	case e.Code == noDatabase:
		cure = "; accepted: a database that exists, as the path of the URL"
	case e.Code == noSchema:
		cure = "; accepted: a schema that exists"
	case e.Code == noRight:
		cure = fmt.Sprintf("; accepted: a user with the rights SELECT, INSERT, UPDATE and DELETE on the table %s, and, unless that exists, CREATE on its schema", d.name)
	case e.Code == undefinedTable:
		cure = d.tableCure()
	case e.Code == readOnly:
		cure = "; accepted: the primary, see the parameter target_session_attrs=read-write"
	}
	return fmt.Errorf("postgres: %w: %w%s", class(e.Code), e, cure)
}

func (d *database) tableCure() string {
	return fmt.Sprintf("; accepted: the table %s that Migration returns, made by a user with a right to CREATE", d.name)
}

// notConnected returns the error of a call that got no connection: its statements were not sent.
func (d *database) notConnected(ctx context.Context, err error) error {
	server := (*pgconn.PgError)(nil)
	switch {
	case errors.Is(err, puddle.ErrClosedPool):
		return errClosed
	case errors.As(err, &server):
		return d.answered(server)
	case ctx.Err() != nil && d.pool.Stat().ConstructingConns() > 0:
		return &gettingReady{fmt.Errorf("postgres: %w: no connection yet: %w", quota.ErrUnavailable, ctx.Err())}
	case ctx.Err() != nil:
		return fmt.Errorf("postgres: %w: no connection is free: %w", quota.ErrUnavailable, ctx.Err())
	}
	sentinel := quota.ErrUnavailable
	if tlsRefused(err) {
		sentinel = quota.ErrMisconfigured
	}
	// The error of the pool holds the configuration with the password. The errors in it hold addresses only.
	if connect := (*pgconn.ConnectError)(nil); errors.As(err, &connect) {
		err = connect.Unwrap()
	}
	return fmt.Errorf("postgres: %w: %w", sentinel, oneLine{err})
}

// oneLine is an error whose text is one line.
type oneLine struct{ error }

func (e oneLine) Error() string { return strings.ReplaceAll(e.error.Error(), "\n", "; ") }
func (e oneLine) Unwrap() error { return e.error }

// tlsRefused reports whether a handshake failed by configuration: a name or authority, or a server without TLS.
func tlsRefused(err error) bool {
	return errors.As(err, new(*tls.CertificateVerificationError)) || errors.As(err, new(x509.UnknownAuthorityError)) ||
		errors.As(err, new(x509.HostnameError)) || strings.Contains(err.Error(), "server refused TLS connection")
}

// gettingReady is a driver.GettingReady.
type gettingReady struct{ error }

func (e *gettingReady) Unwrap() error      { return e.error }
func (e *gettingReady) GettingReady() bool { return true }

var errClosed = fmt.Errorf("postgres: the store is %w", quota.ErrClosed)

func invalid(format string, args ...any) error {
	return fmt.Errorf("postgres: %w: "+format, append([]any{quota.ErrInvalid}, args...)...)
}
