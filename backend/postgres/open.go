package postgres

import (
	"context"
	"errors"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/quota"
)

func init() { backend.Register("postgres", []string{"postgres", "postgresql"}, open) }

// defaultConnectTimeout bounds an attempt at connecting to a host: pgx's own bound is two minutes.
const defaultConnectTimeout = 5 * time.Second

// clientParameters are those that pgx takes, and settings are those of the server that a URL may set; the parameter
// options sets any other.
var (
	clientParameters = []string{"host", "port", "dbname", "database", "user", "password", "passfile", "connect_timeout", "sslmode", "sslkey",
		"sslcert", "sslcertmode", "sslrootcert", "sslnegotiation", "sslpassword", "sslsni", "krbspn", "krbsrvname", "target_session_attrs", "service",
		"servicefile", "min_protocol_version", "max_protocol_version", "channel_binding", "require_auth", "default_query_exec_mode",
		"statement_cache_capacity", "description_cache_capacity",
		"pool_max_conns", "pool_min_conns", "pool_min_idle_conns", "pool_max_conn_lifetime", "pool_max_conn_lifetime_jitter",
		"pool_max_conn_idle_time", "pool_health_check_period", "pool_ping_timeout"}
	settings = []string{"application_name", "options", "search_path", "synchronous_commit", "statement_timeout", "lock_timeout",
		"idle_in_transaction_session_timeout"}
)

// open makes the store of a URL, and its pool. It sends nothing, so it works while the server is down.
func open(ctx context.Context, u *url.URL) (quota.Store, error) {
	config, o, err := parse(u)
	if err != nil {
		return nil, err
	}
	own := newSockets(config.ConnConfig.DialFunc)
	config.ConnConfig.DialFunc = own.dial
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, invalid("the URL makes no pool of connections; accepted: the parameters of pgxpool.ParseConfig")
	}
	s, err := newStore(pool, own, o)
	if err != nil {
		pool.Close()
		return nil, err
	}
	return s, nil
}

// parse reads the URL's own parameters, and hands the others to pgx.
func parse(u *url.URL) (*pgxpool.Config, *Options, error) {
	// In a URL of PostgreSQL a plus sign is no space.
	q, err := url.ParseQuery(strings.ReplaceAll(u.RawQuery, "+", "%2B"))
	if err != nil {
		return nil, nil, invalid("the parameters of the URL cannot be parsed; accepted: ?name=value&name=value")
	}
	o := &Options{}
	for name, values := range q {
		switch {
		case len(values) > 1:
			return nil, nil, invalid("parameter %.40q comes %d times; accepted: once", name, len(values))
		case name == "table":
			o.Table = values[0]
		case name == "schema":
			o.Schema = values[0]
		case name == "migrate" && (values[0] == "true" || values[0] == "false"):
			o.NoMigrate = values[0] == "false"
		case name == "migrate":
			return nil, nil, invalid("parameter migrate is %.40q; accepted: true or false", values[0])
		case !slices.Contains(clientParameters, name) && !slices.Contains(settings, name):
			return nil, nil, invalid("unknown parameter %.40q; accepted: table, schema, migrate, those of pgxpool.ParseConfig, and %s; options=-c name=value sets others of the server",
				name, strings.Join(settings, ", "))
		}
	}
	if _, err := o.name(); err != nil {
		return nil, nil, err
	}
	for _, name := range [...]string{"table", "schema", "migrate"} {
		q.Del(name)
	}
	v := *u
	v.RawQuery = strings.ReplaceAll(q.Encode(), "+", "%20")
	config, err := pgxpool.ParseConfig(v.String())
	if err != nil {
		return nil, nil, invalid("the URL is not accepted by pgx: %s; accepted: postgres://user:password@host:port/database?name=value", reason(err))
	}
	if config.ConnConfig.RuntimeParams["application_name"] == "" {
		config.ConnConfig.RuntimeParams["application_name"] = "fleetquota"
	}
	if config.ConnConfig.ConnectTimeout == 0 {
		config.ConnConfig.ConnectTimeout = defaultConnectTimeout
	}
	// A call on a connection that broke while it was idle is sent again on a new one, for it begins with a read.
	config.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return false }
	return config, o, nil
}

// reason returns the message of an error of pgx's parser, without the URL that it quotes.
func reason(err error) string {
	text := err.Error()
	if parser := (*pgconn.ParseConfigError)(nil); errors.As(err, &parser) {
		_, text, _ = strings.Cut(text, "`: ")
	}
	return text
}

// sockets are the connections of a store's own pool.
type sockets struct {
	next pgconn.DialFunc

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
}

func newSockets(next pgconn.DialFunc) *sockets {
	return &sockets{next: next, conns: map[net.Conn]struct{}{}}
}

func (s *sockets) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	c, err := s.next(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	own := &socket{c, s}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		c.Close()
		return nil, net.ErrClosed
	}
	s.conns[own] = struct{}{}
	return own, nil
}

// close cuts all connections, and those to come.
func (s *sockets) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for c := range s.conns {
		c.(*socket).Conn.Close()
	}
}

type socket struct {
	net.Conn
	all *sockets
}

func (c *socket) Close() error {
	c.all.mu.Lock()
	delete(c.all.conns, c)
	c.all.mu.Unlock()
	return c.Conn.Close()
}
