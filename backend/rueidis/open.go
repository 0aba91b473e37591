package rueidis

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/url"
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
	l := newLazy(c)
	s, err := engine.New(c.Guard(l), c.Cluster, engine.Options{Prefix: c.Prefix, Strict: c.Strict, Batching: c.Batching})
	if err != nil {
		return nil, err
	}
	// Nothing is dialled before the first call.
	c.Dialed, c.Closed = s.Dialed, s.Forget
	c.Lost = func(addr string) {
		l.shake()
		s.Lost(addr)
	}
	return &Store{engine: s, prompt: true}, nil
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

// lazy is an engine.Client whose Warm makes the client, for rueidis makes none while Redis is down. The engine warms it
// before it calls another method, and makes one attempt at a time.
type lazy struct {
	c    *redisurl.Config
	made atomic.Pointer[adapter]
	// repair replaces a client that leads to a demoted primary; retired are such clients, until they are closed.
	repair  engine.Repair
	retired sync.WaitGroup
	// life ends with Close, and with it an attempt at connecting.
	life context.Context
	end  context.CancelFunc

	// mu guards the fields below. Once closed, made is not set.
	mu     sync.Mutex
	closed bool
	making *making // the client of a cluster; nil if there is none or it is made
}

// making is the making of a client.
type making struct {
	done     chan struct{}
	failed   int           // dials, guarded by lazy.mu
	hopeless chan struct{} // closed when a dial of each address has failed
}

func newLazy(c *redisurl.Config) *lazy {
	l := &lazy{c: c}
	l.repair.Do = l.renew
	l.life, l.end = context.WithCancel(context.Background())
	return l
}

func (l *lazy) Do(ctx context.Context, args []any, keys int) (engine.Reply, error) {
	a := l.made.Load()
	if a == nil {
		return nil, errNoClient
	}
	return a.Do(ctx, args, keys)
}

func (l *lazy) DoAll(ctx context.Context, scripts [][]any) ([]engine.Reply, error) {
	a := l.made.Load()
	if a == nil {
		return nil, errNoClient
	}
	return a.DoAll(ctx, scripts)
}

func (l *lazy) Info(ctx context.Context) ([]string, error) {
	a := l.made.Load()
	if a == nil {
		return nil, errNoClient
	}
	return a.Info(ctx)
}

func (l *lazy) Scan(ctx context.Context, node, key string, scan []string) (engine.Scanned, error) {
	a := l.made.Load()
	if a == nil {
		return engine.Scanned{}, errNoClient
	}
	return a.Scan(ctx, node, key, scan)
}

var errClientClosed = fmt.Errorf("redis: the client is %w", quota.ErrClosed)

var errNoClient = fmt.Errorf("redis: %w: not connected yet", quota.ErrUnavailable)

// Warm makes the client if there is none, and has it make its connections to a node.
func (l *lazy) Warm(ctx context.Context, name, key string) error {
	a := l.made.Load()
	if a == nil {
		client, err := l.connect()
		if err != nil {
			return err
		}
		a = l.adapt(client)
		l.mu.Lock()
		closed := l.closed
		if !closed {
			l.made.Store(a)
		}
		l.mu.Unlock()
		if closed {
			a.Close()
			return fmt.Errorf("redis: %w", quota.ErrClosed)
		}
	}
	return a.Warm(ctx, name, key)
}

// connect makes a client. Its errors say 'not charged'.
func (l *lazy) connect() (rueidis.Client, error) {
	if l.c.Cluster {
		m := &making{done: make(chan struct{}), hopeless: make(chan struct{})}
		l.mu.Lock()
		l.making = m
		l.mu.Unlock()
		defer func() {
			l.mu.Lock()
			l.making = nil
			l.mu.Unlock()
			close(m.done)
		}()
	}
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
	conn, err := l.c.Dial(ctx, d, addr)
	if err != nil {
		if l.c.Cluster {
			l.hold()
		}
		return nil, err
	}
	return watched{conn, l.shake}, nil
}

// hold delays the error of a dial until the client is made, or the dials of all addresses have failed. While a client of
// a cluster is being made, the first such error makes it put off its question for the slots by up to a second,
// although another node is connected by then.
func (l *lazy) hold() {
	l.mu.Lock()
	m := l.making
	if m == nil {
		l.mu.Unlock()
		return
	}
	m.failed++
	if m.failed == len(l.c.Addrs) {
		close(m.hopeless)
	}
	l.mu.Unlock()
	patience := time.NewTimer(l.c.DialTimeout) // a node may take the connection and answer nothing
	defer patience.Stop()
	select {
	case <-m.done:
	case <-m.hopeless:
	case <-l.life.Done():
	case <-patience.C:
	}
}

// Close closes the client if there is one, and ends an attempt at connecting.
func (l *lazy) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.end()
	l.repair.Close()
	l.repair.Wait()
	l.retired.Wait()
	if a := l.made.Load(); a != nil {
		return a.Close()
	}
	return nil
}

var (
	_ engine.Client = (*lazy)(nil)
	_ engine.Warmer = (*lazy)(nil)
)
