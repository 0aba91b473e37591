package rueidis

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/backend/internal/redisurl"
	"github.com/fleetquota/fleetquota/quota"
)

func init() { backend.Register("rueidis", redisurl.Schemes, open) }

// open makes the store of a URL. It sends nothing; the first call connects.
func open(_ context.Context, u *url.URL) (quota.Store, error) {
	c, err := redisurl.Parse(u)
	if err != nil {
		return nil, err
	}
	s, err := engine.New(c.Guard(newLazy(c)), c.Cluster, engine.Options{Prefix: c.Prefix, Strict: c.Strict})
	if err != nil {
		return nil, err
	}
	return &Store{engine: s}, nil
}

const (
	// keepAlive is how long a connection may be silent before it is probed.
	keepAlive = time.Second
	// topologyInterval is how often the client asks the sentinels for the master; otherwise one lost message
	// would leave it with a server that was demoted.
	topologyInterval = 5 * time.Second
	// redirections bounds how often nodes of a cluster that disagree may redirect a call.
	redirections = 3
	// flushDelay is how long a script to a node of a cluster, where few keys share a slot and with it a
	// script, may wait for others to be written with it. A call waits only if others are in flight.
	flushDelay = 20 * time.Microsecond
)

// options returns the client's options. ConnLifetime must stay 0, see the package documentation.
func options(c *redisurl.Config, dial func(context.Context, string, *net.Dialer, *tls.Config) (net.Conn, error)) rueidis.ClientOption {
	dialer := net.Dialer{Timeout: c.DialTimeout, KeepAlive: keepAlive}
	o := rueidis.ClientOption{
		InitAddress:      c.Addrs,
		Username:         c.Username,
		Password:         c.Password,
		SelectDB:         c.DB,
		TLSConfig:        c.TLS,
		AlwaysRESP2:      c.RESP2,
		Dialer:           dialer,
		DialCtxFn:        dial,
		ConnWriteTimeout: 2 * c.Timeout,
		// A caller whose context ends must not close the shared connection.
		AlwaysPipelining: true,
		// Both would need rights that the scripts do not.
		DisableCache:  true,
		ClientSetInfo: rueidis.DisableClientSetInfo,
		ClusterOption: rueidis.ClusterOption{MaxMovedRedirections: redirections},
		// Do not ask a single server for a cluster's slots.
		ForceSingleClient: !c.Cluster && c.Master == "",
	}
	if c.Cluster {
		o.MaxFlushDelay = flushDelay
	}
	if c.Master != "" {
		o.Sentinel = rueidis.SentinelOption{
			MasterSet:               c.Master,
			Username:                c.SentinelUsername,
			Password:                c.SentinelPassword,
			TLSConfig:               c.TLS,
			Dialer:                  dialer,
			TopologyRefreshInterval: topologyInterval,
		}
	}
	return o
}

// lazy is an engine.Client that connects at its first call, for rueidis makes no client while Redis is down.
// There is at most one attempt at a time, which all calls share that come meanwhile.
type lazy struct {
	c    *redisurl.Config
	made atomic.Pointer[adapter]
	// life ends with Close, and with it an attempt.
	life context.Context
	end  context.CancelFunc

	// mu guards the fields below. Once closed, made is not set.
	mu      sync.Mutex
	closed  bool
	current *attempt // nil if there is none
}

// attempt is an attempt at connecting. err is set before done is closed.
type attempt struct {
	done chan struct{}
	err  error
}

func newLazy(c *redisurl.Config) *lazy {
	l := &lazy{c: c}
	l.life, l.end = context.WithCancel(context.Background())
	return l
}

func (l *lazy) Do(ctx context.Context, args []any, keys int) (engine.Reply, error) {
	a := l.made.Load()
	if a == nil {
		var err error
		if a, err = l.connected(ctx); err != nil {
			return nil, err
		}
	}
	return a.Do(ctx, args, keys)
}

func (l *lazy) Info(ctx context.Context) ([]string, error) {
	a, err := l.connected(ctx)
	if err != nil {
		return nil, err
	}
	return a.Info(ctx)
}

// connected returns the client. If it fails, nothing was sent.
func (l *lazy) connected(ctx context.Context) (*adapter, error) {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil, fmt.Errorf("redis: %w", quota.ErrClosed)
	}
	if a := l.made.Load(); a != nil {
		l.mu.Unlock()
		return a, nil
	}
	t := l.current
	if t == nil {
		t = &attempt{done: make(chan struct{})}
		l.current = t
		go l.try(t)
	}
	l.mu.Unlock()

	patience := time.NewTimer(l.c.DialTimeout)
	defer patience.Stop()
	select {
	case <-t.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-patience.C:
		return nil, fmt.Errorf("redis: %w: no connection within %v: %w", quota.ErrUnavailable, l.c.DialTimeout, os.ErrDeadlineExceeded)
	}
	if t.err != nil {
		return nil, t.err
	}
	return l.made.Load(), nil
}

// try makes an attempt.
func (l *lazy) try(t *attempt) {
	client, err := l.connect()
	l.mu.Lock()
	closed := l.closed
	if err == nil && !closed {
		a := newAdapter(client)
		a.owned = true
		l.made.Store(a)
	}
	l.current = nil
	l.mu.Unlock()
	if closed {
		if err == nil {
			client.Close()
		}
		err = fmt.Errorf("redis: %w", quota.ErrClosed)
	}
	t.err = err
	close(t.done)
}

// connect makes a client. Its errors say 'not charged'.
func (l *lazy) connect() (rueidis.Client, error) {
	client, err := rueidis.NewClient(options(l.c, l.dial))
	if err != nil {
		if client != nil {
			client.Close() // rueidis returns one for a single server, connected or not
		}
		_, reply := rueidis.IsRedisErr(err)
		return nil, engine.ConnectError(err, reply)
	}
	if l.c.Cluster && client.Mode() != rueidis.ClientModeCluster {
		// If CLUSTER SLOTS fails, rueidis uses the one server that it knows. Even a node of a cluster would
		// answer MOVED for most keys.
		client.Close()
		return nil, fmt.Errorf("redis: %w: the server is no part of a cluster, or the user has no right to CLUSTER SLOTS; accepted: redis:// for a single server, or that right",
			quota.ErrMisconfigured)
	}
	return client, nil
}

func (l *lazy) dial(ctx context.Context, addr string, d *net.Dialer, _ *tls.Config) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(l.life, cancel)()
	return l.c.Dial(ctx, d, addr)
}

// Close closes the client if there is one, and ends an attempt.
func (l *lazy) Close() error {
	l.mu.Lock()
	l.closed = true
	t := l.current
	l.mu.Unlock()
	l.end()
	if t != nil {
		<-t.done
	}
	if a := l.made.Load(); a != nil {
		return a.Close()
	}
	return nil
}

var _ engine.Client = (*lazy)(nil)
