package postgres

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// TestAnswers checks the class of each error of a server or proxy: as the answer to a read, and to a write.
func TestAnswers(t *testing.T) {
	d := &database{name: `"fleetquota"`}
	const unknown = "unknown outcome"
	for _, test := range []struct {
		severity, code string
		read           error
		write          string // "" is the same as for the read
	}{
		{"ERROR", "40001", quota.ErrConflict, ""}, // serialization failure
		{"ERROR", "40P01", quota.ErrConflict, ""}, // deadlock
		{"ERROR", "55P03", quota.ErrConflict, ""}, // lock timeout
		{"ERROR", "40003", quota.ErrConflict, unknown},
		{"ERROR", "57014", quota.ErrUnavailable, ""},      // statement timeout, or cancelled
		{"ERROR", "25006", quota.ErrUnavailable, ""},      // read-only
		{"ERROR", "53100", quota.ErrUnavailable, ""},      // disk full
		{"ERROR", "53200", quota.ErrUnavailable, ""},      // out of memory
		{"FATAL", "53300", quota.ErrUnavailable, unknown}, // too many connections
		{"FATAL", "57P01", quota.ErrUnavailable, unknown}, // shutdown
		{"FATAL", "57P02", quota.ErrUnavailable, unknown}, // crash
		{"FATAL", "57P03", quota.ErrUnavailable, unknown}, // starting up
		{"FATAL", "57P05", quota.ErrUnavailable, unknown}, // idle session timeout
		{"FATAL", "25P03", quota.ErrUnavailable, unknown}, // idle in transaction
		{"PANIC", "XX000", quota.ErrUnavailable, unknown},
		{"ERROR", "XX000", quota.ErrUnavailable, ""},
		{"ERROR", "58030", quota.ErrUnavailable, ""},      // input or output failed
		{"ERROR", "08006", quota.ErrUnavailable, unknown}, // of a proxy
		{"FATAL", "08P01", quota.ErrUnavailable, unknown},
		{"ERROR", "P0001", quota.ErrUnavailable, ""}, // raised by a trigger
		{"ERROR", "42501", quota.ErrMisconfigured, ""},
		{"ERROR", "42P01", quota.ErrMisconfigured, ""},
		{"ERROR", "42703", quota.ErrMisconfigured, ""},
		{"FATAL", "42704", quota.ErrMisconfigured, unknown}, // unknown setting
		{"ERROR", "0A000", quota.ErrMisconfigured, ""},
		{"FATAL", "28P01", quota.ErrMisconfigured, unknown},
		{"FATAL", "28000", quota.ErrMisconfigured, unknown},
		{"FATAL", "3D000", quota.ErrMisconfigured, unknown},
		{"ERROR", "3F000", quota.ErrMisconfigured, ""},
		{"ERROR", "", quota.ErrUnavailable, ""},
	} {
		e := &pgconn.PgError{Severity: "FEHLER", SeverityUnlocalized: test.severity, Code: test.code, Message: "words"}
		if got := driver.Sentinel(d.refused(t.Context(), e)); got != test.read {
			t.Errorf("%s %s to a read: got %v, want %v", test.severity, test.code, got, test.read)
		}
		want := test.read
		if test.write == unknown {
			want = quota.ErrIndeterminate
		}
		if got := driver.Sentinel(d.unanswered(t.Context(), e)); got != want {
			t.Errorf("%s %s to a write: got %v, want %v", test.severity, test.code, got, want)
		}
	}
	// A proxy sends the severity once.
	if err := d.unanswered(t.Context(), &pgconn.PgError{Severity: "ERROR", Code: "57014"}); !errors.Is(err, quota.ErrUnavailable) {
		t.Errorf("an error without the second severity: got %v, want ErrUnavailable", err)
	}
}

// safe is an error that pgconn would have a caller retry.
type safe struct{ error }

func (safe) SafeToRetry() bool { return true }

// TestUnanswered checks errors that are no answers.
func TestUnanswered(t *testing.T) {
	d := &database{}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	lost := safe{io.ErrUnexpectedEOF}
	for _, test := range []struct {
		name string
		got  error
		want error
		also error
	}{
		{"a lost reply to a read", d.refused(t.Context(), lost), quota.ErrUnavailable, lost},
		{"a lost reply to a write", d.unanswered(t.Context(), lost), quota.ErrIndeterminate, lost},
		{"a context that ended in a read", d.refused(ended, lost), quota.ErrUnavailable, context.Canceled},
		{"a context that ended in a write", d.unanswered(ended, lost), quota.ErrIndeterminate, context.Canceled},
		{"a statement that was not prepared", d.unanswered(t.Context(), notSent{lost}), quota.ErrUnavailable, lost},
	} {
		if driver.Sentinel(test.got) != test.want || !errors.Is(test.got, test.also) {
			t.Errorf("%s: got %v, want %v and %v", test.name, test.got, test.want, test.also)
		}
	}
	if !tlsRefused(fmt.Errorf("tls error: %w", x509.HostnameError{Certificate: &x509.Certificate{}, Host: "h"})) {
		t.Error("a certificate of another name: got no refusal, want one")
	}
}

// TestURLs checks what a URL may have. Open sends nothing.
func TestURLs(t *testing.T) {
	for _, test := range []struct{ url, says string }{
		{"postgres://u:secret@h/db?tabel=x", `"tabel"; accepted: table, schema, migrate`},
		{"postgres://u:secret@h/db?table=x%20y", `Options.Table is "x y"; accepted: 1 to 63`},
		{"postgres://u:secret@h/db?table=" + strings.Repeat("x", 64), "accepted: 1 to 63"},
		{"postgres://u:secret@h/db?schema=1x", `Options.Schema is "1x"`},
		{"postgres://u:secret@h/db?migrate=no", `migrate is "no"; accepted: true or false`},
		{"postgres://u:secret@h/db?table=a&table=b", `"table" comes 2 times`},
		{"postgres://u:secret@h/db?pool_max_conns=abc", "pool_max_conns"},
		{"postgres://u:secret@h/db?sslmode=secret", "sslmode"},
		{"postgres://u:secret@h:secret/db", ""},
		{"postgres://u@h/db?password=secret&sslmode=perhaps", "sslmode"},
	} {
		_, _, err := parse(parsed(t, strings.ReplaceAll(test.url, "h:secret", "h:99999")))
		if !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), test.says) || !strings.Contains(err.Error(), "accepted: ") {
			t.Errorf("%s: got %v, want ErrInvalid that says %q", test.url, err, test.says)
		}
		if err != nil && strings.Contains(strings.ReplaceAll(err.Error(), "sslmode", ""), "secret@") {
			t.Errorf("%s: got %v, want an error without the password", test.url, err)
		}
	}
	config, o, err := parse(parsed(t, "postgresql://u:p@h:5555/db?schema=S&table=T&migrate=false&pool_max_conns=7&synchronous_commit=off&sslmode=disable&options=-c%20a=b+c"))
	if err != nil {
		t.Fatal(err)
	}
	if *o = (Options{Schema: o.Schema, Table: o.Table, NoMigrate: o.NoMigrate}); o.Schema != "S" || o.Table != "T" || !o.NoMigrate {
		t.Errorf("options: got %+v, want the parameters", o)
	}
	c := config.ConnConfig
	if config.MaxConns != 7 || c.Port != 5555 || c.RuntimeParams["synchronous_commit"] != "off" || c.RuntimeParams["table"] != "" || c.RuntimeParams["options"] != "-c a=b+c" ||
		c.RuntimeParams["application_name"] != "fleetquota" || c.ConnectTimeout != defaultConnectTimeout {
		t.Errorf("configuration: got %d connections, port %d, settings %v, a timeout of %v; want 7, 5555, those of the URL, %v", config.MaxConns, c.Port, c.RuntimeParams, c.ConnectTimeout, defaultConnectTimeout)
	}
	if _, err := New(nil, nil); !errors.Is(err, quota.ErrInvalid) {
		t.Errorf("New without a pool: got %v, want ErrInvalid", err)
	}
	if _, err := Migration(&Options{Table: `x"; DROP TABLE y`}); !errors.Is(err, quota.ErrInvalid) {
		t.Errorf("Migration of a table with a quote: got %v, want ErrInvalid", err)
	}
}
