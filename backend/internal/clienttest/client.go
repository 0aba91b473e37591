package clienttest

import (
	"context"
	"crypto/tls"
	"net"
	"strings"
	"testing"
	"time"

	goredisclient "github.com/redis/go-redis/v9"
	rueidisclient "github.com/redis/rueidis"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// library is a client library.
type library struct {
	name    string
	connect func(target) (conn, error)
	pooled  bool                            // callers wait for connections of a pool
	lazy    bool                            // makes a client while its servers are down
	engine  func(quota.Store) *engine.Store // under a store; nil unless Run was given it
}

// libraries is the only table of clients. Their settings for retries are the library's own, as users have
// them.
var libraries = []library{
	{name: "goredis", connect: connectGoredis, pooled: true, lazy: true},
	{name: "rueidis", connect: connectRueidis},
}

// target is the place that a client connects to, and the way there.
type target struct {
	addrs          []string // of a server, of nodes of a cluster, or of sentinels
	cluster        bool
	master         string                                                            // its name, where addrs are of sentinels
	dialer         func(ctx context.Context, network, addr string) (net.Conn, error) // nil is the client's own
	user, password string
	pool           int            // connections, of a client that has a pool; 0 is the client's own number
	timeout        time.Duration  // of a dial, a read and a write; 0 is 2 s
	options        engine.Options // of the first store
	hook           func()         // is called before each script, unless nil
}

func single(s *redisserver.Server) target { return target{addrs: []string{s.Addr()}} }

func clustered(c *redisserver.Cluster) target { return target{addrs: c.Addrs(), cluster: true} }

func (to target) through(p *redisserver.Proxies) target {
	to.dialer = p.DialContext
	return to
}

// store is a store of either client.
type store interface {
	quota.Store
	driver.Graded
	driver.HealthReporter
}

// conn is a client with a store.
type conn struct {
	store
	open    func(engine.Options) (store, error)    // another store over the same client
	ping    func() error                           // past the store
	evalsha func(sha, key, value, px string) error // past the store
	close   func()                                 // closes the client
}

// with completes a conn by its first store, or closes the client.
func (c conn) with(o engine.Options) (conn, error) {
	var err error
	if c.store, err = c.open(o); err != nil {
		c.close()
		return conn{}, err
	}
	return c, nil
}

func connectGoredis(to target) (conn, error) {
	if to.timeout == 0 {
		to.timeout = 2 * time.Second
	}
	o := &goredisclient.UniversalOptions{
		Addrs: to.addrs, MasterName: to.master, IsClusterMode: to.cluster, Username: to.user, Password: to.password,
		PoolSize: to.pool, DialTimeout: to.timeout, ReadTimeout: to.timeout, WriteTimeout: to.timeout, PoolTimeout: to.timeout,
		ContextTimeoutEnabled: true,
	}
	if to.dialer != nil {
		o.Dialer = to.dialer
	}
	client := goredisclient.NewUniversalClient(o)
	if to.hook != nil {
		client.AddHook(hook(to.hook))
		if c, is := client.(*goredisclient.ClusterClient); is {
			c.OnNewNode(func(node *goredisclient.Client) { node.AddHook(hook(to.hook)) })
		}
	}
	return conn{
		open: func(o engine.Options) (store, error) {
			return goredis.New(client, &goredis.Options{Prefix: o.Prefix, Strict: o.Strict, Batching: goredis.Batching(o.Batching), Notice: o.Notice, Clock: o.Clock})
		},
		ping: func() error { return client.Ping(bg).Err() },
		evalsha: func(sha, key, value, px string) error {
			return client.EvalSha(bg, sha, []string{key}, value, px).Err()
		},
		close: func() { client.Close() },
	}.with(to.options)
}

func connectRueidis(to target) (conn, error) {
	if to.timeout == 0 {
		to.timeout = 2 * time.Second
	}
	o := rueidisclient.ClientOption{
		InitAddress: to.addrs, Username: to.user, Password: to.password,
		Dialer: net.Dialer{Timeout: to.timeout}, ConnWriteTimeout: to.timeout,
		AlwaysPipelining: true, DisableCache: true, ForceSingleClient: !to.cluster && to.master == "",
		Sentinel:      rueidisclient.SentinelOption{MasterSet: to.master},
		ClusterOption: rueidisclient.ClusterOption{MaxMovedRedirections: 3}, // its own number is to follow them for ever
	}
	if to.dialer != nil {
		o.DialCtxFn = func(ctx context.Context, addr string, _ *net.Dialer, _ *tls.Config) (net.Conn, error) {
			return to.dialer(ctx, "tcp", addr)
		}
	}
	client, err := rueidisclient.NewClient(o)
	if err != nil {
		return conn{}, err
	}
	if to.hook != nil {
		client = hooked{client, to.hook}
	}
	return conn{
		open: func(o engine.Options) (store, error) {
			return rueidis.New(client, &rueidis.Options{Prefix: o.Prefix, Strict: o.Strict, Batching: rueidis.Batching(o.Batching), Notice: o.Notice, Clock: o.Clock})
		},
		ping: func() error { return client.Do(bg, client.B().Ping().Build()).Error() },
		evalsha: func(sha, key, value, px string) error {
			_, err := client.Do(bg, client.B().Evalsha().Sha1(sha).Numkeys(1).Key(key).Arg(value, px).Build()).ToArray()
			return err
		},
		close: client.Close,
	}.with(to.options)
}

// hook is a hook of go-redis.
type hook func()

func (hook) DialHook(next goredisclient.DialHook) goredisclient.DialHook { return next }

func (h hook) ProcessHook(next goredisclient.ProcessHook) goredisclient.ProcessHook {
	return func(ctx context.Context, c goredisclient.Cmder) error {
		h.before(c.Name())
		return next(ctx, c)
	}
}

func (h hook) ProcessPipelineHook(next goredisclient.ProcessPipelineHook) goredisclient.ProcessPipelineHook {
	return func(ctx context.Context, cs []goredisclient.Cmder) error {
		h.before(cs[0].Name())
		return next(ctx, cs)
	}
}

func (h hook) before(command string) {
	if strings.HasPrefix(strings.ToLower(command), "eval") {
		h()
	}
}

// hooked is a client of rueidis with a hook.
type hooked struct {
	rueidisclient.Client
	hook hook
}

func (h hooked) Do(ctx context.Context, c rueidisclient.Completed) rueidisclient.RedisResult {
	h.hook.before(c.Commands()[0])
	return h.Client.Do(ctx, c)
}

func (h hooked) Nodes() map[string]rueidisclient.Client {
	nodes := h.Client.Nodes()
	for addr, node := range nodes {
		nodes[addr] = hooked{node, h.hook}
	}
	return nodes
}

// dial connects and ends store and client with the test.
func (l library) dial(t testing.TB, to target) conn {
	t.Helper()
	c, err := l.connect(to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.store.Close(); c.close() })
	return c
}

// open opens a URL, to which it adds the parameter client, and ends the store with the test.
func (l library) open(t testing.TB, url string) quota.Store {
	t.Helper()
	s, err := backend.Open(bg, by(url, l.name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}
