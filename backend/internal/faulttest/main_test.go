package faulttest

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	goredisclient "github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	rueidisclient "github.com/redis/rueidis"
	"go.uber.org/goleak"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

func TestMain(m *testing.M) {
	logging.Disable() // it tells of every connection that the tests break
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		f.Value.Set("6") // they wait more than they work
	}
	code := m.Run()
	// Clients that are closed leave goroutines that sleep for up to five seconds.
	var left error
	for start := time.Now(); time.Since(start) < patience; {
		if left = goleak.Find(); left == nil {
			break
		}
	}
	if code == 0 && left != nil {
		fmt.Println(left)
		code = 1
	}
	os.Exit(code)
}

var bg = context.Background()

const year = 365 * 24 * time.Hour

// target is what a client connects to, and how.
type target struct {
	addrs          []string
	cluster        bool
	master         string                                                            // its name, where addrs are sentinels
	dialer         func(ctx context.Context, network, addr string) (net.Conn, error) // nil is the client's own
	tls            *tls.Config
	user, password string
	pool           int           // connections, of clients that have a pool; 0 is the client's own
	timeout        time.Duration // of a dial, a read and a write; 0 is 2 s
	alone          bool          // no call gathers with others
	notice         func(quota.Notice)
	clock          func() time.Time
}

func single(s *redisserver.Server) target { return target{addrs: []string{s.Addr()}} }

func (to target) through(p *redisserver.Proxies) target {
	to.dialer = p.DialContext
	return to
}

func clustered(c *redisserver.Cluster) target { return target{addrs: c.Addrs(), cluster: true} }

// store is a store of either client.
type store interface {
	quota.Store
	driver.HealthReporter
}

// conn is a store over a client of its own.
type conn struct {
	store
	ping  func() error // through the client, past the store
	close func()       // closes the client
}

// library is a client library. Clients keep the library's own settings for retries, which is what users have.
type library struct {
	name string
	dial func(target) (conn, error)
}

var libraries = []library{{"goredis", dialGoredis}, {"rueidis", dialRueidis}}

func dialGoredis(to target) (conn, error) {
	timeout := to.timeout
	if timeout == 0 {
		timeout = 2 * time.Second
	}
	o := &goredisclient.UniversalOptions{
		Addrs: to.addrs, MasterName: to.master, IsClusterMode: to.cluster, TLSConfig: to.tls, Username: to.user, Password: to.password,
		PoolSize: to.pool, DialTimeout: timeout, ReadTimeout: timeout, WriteTimeout: timeout, PoolTimeout: timeout,
		ContextTimeoutEnabled: true,
	}
	if to.dialer != nil {
		o.Dialer = to.dialer
	}
	client := goredisclient.NewUniversalClient(o)
	s, err := goredis.New(client, &goredis.Options{NoBatching: to.alone, Notice: to.notice, Clock: to.clock})
	if err != nil {
		client.Close()
		return conn{}, err
	}
	return conn{s, func() error { return client.Ping(bg).Err() }, func() { client.Close() }}, nil
}

func dialRueidis(to target) (conn, error) {
	timeout := to.timeout
	if timeout == 0 {
		timeout = 2 * time.Second
	}
	o := rueidisclient.ClientOption{
		InitAddress: to.addrs, TLSConfig: to.tls, Username: to.user, Password: to.password,
		Dialer: net.Dialer{Timeout: timeout}, ConnWriteTimeout: timeout,
		AlwaysPipelining: true, DisableCache: true, ForceSingleClient: !to.cluster && to.master == "",
		Sentinel:      rueidisclient.SentinelOption{MasterSet: to.master},
		ClusterOption: rueidisclient.ClusterOption{MaxMovedRedirections: 3}, // its own is to follow them for ever
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
	s, err := rueidis.New(client, &rueidis.Options{NoBatching: to.alone, Notice: to.notice, Clock: to.clock})
	if err != nil {
		client.Close()
		return conn{}, err
	}
	return conn{s, func() error { return client.Do(bg, client.B().Ping().Build()).Error() }, client.Close}, nil
}

// open dials and ends store and client with the test.
func (l library) open(t testing.TB, to target) conn {
	t.Helper()
	c, err := l.dial(to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.store.Close(); c.close() })
	return c
}

// eachLibrary runs a test through every library. It gets its own servers, so that faults do not mix.
func eachLibrary(t *testing.T, f func(t *testing.T, l library)) {
	t.Parallel()
	for _, l := range libraries {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			f(t, l)
		})
	}
}

// yearly returns a limit whose counts stay while a test runs.
func yearly(n int64) *quota.Limit {
	return quota.Must(quota.NewLimit("yearly", quota.Must(algorithm.FixedWindow(n, year))))
}

// plenty is more than any test takes.
const plenty = 1 << 20

// keys returns n keys of as many groups, which fall all over a cluster.
func keys(n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = "team-" + strconv.Itoa(i)
	}
	return list
}

// charged returns what the keys of a limit have consumed, as the server holds it.
func charged(t testing.TB, s quota.Store, l *quota.Limit, keys ...string) (n int64) {
	t.Helper()
	for _, k := range keys {
		d, err := s.Take(bg, quota.Charge{Limit: l, Key: k, Op: quota.OpPeek})
		if err != nil {
			t.Fatal("peek: ", err)
		}
		n += d.Limit - d.Remaining
	}
	return n
}

// runs returns how many of the engine's scripts the servers ran since they started: each asks for the time once.
func runs(t testing.TB, servers ...*redisserver.Server) (n int64) {
	t.Helper()
	for _, s := range servers {
		stats, err := s.Info("commandstats")
		if err != nil {
			t.Fatal(err)
		}
		for field := range strings.SplitSeq(stats["cmdstat_time"], ",") {
			if calls, ok := strings.CutPrefix(field, "calls="); ok {
				m, _ := strconv.ParseInt(calls, 10, 64)
				n += m
			}
		}
	}
	return n
}

func servers(c *redisserver.Cluster) (list []*redisserver.Server) {
	for _, n := range c.Nodes {
		list = append(list, n.Server)
	}
	return list
}

// classes are the errors of which exactly one must match.
var classes = []error{
	quota.ErrInvalid, quota.ErrUnavailable, quota.ErrIndeterminate, quota.ErrConflict, quota.ErrCrossSlot, quota.ErrOverloaded,
	quota.ErrMisconfigured, quota.ErrClosed,
}

// class returns the class of an error. An error of none, such as a context's, is its own.
func class(err error) error {
	found := err
	for _, c := range classes {
		if errors.Is(err, c) {
			if found != err {
				return fmt.Errorf("two classes: %w", err)
			}
			found = c
		}
	}
	return found
}

// tally counts the outcomes of calls, by class.
type tally struct {
	mu       sync.Mutex
	ok       int64 // granted
	denied   int64
	failed   map[error]int64
	texts    map[string]int64
	lastOK   time.Time
	gap      time.Duration // the longest time from one grant to the next
	slowest  time.Duration
	examples []error
}

func (y *tally) add(d quota.Decision, err error, took time.Duration) {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.slowest = max(y.slowest, took)
	switch {
	case err != nil:
		if y.failed == nil {
			y.failed, y.texts = map[error]int64{}, map[string]int64{}
		}
		c := class(err)
		if c == err {
			y.examples = append(y.examples, err)
			c = errOdd
		}
		y.failed[c]++
		if len(y.texts) < 20 {
			y.texts[err.Error()]++
		}
	case d.Allowed:
		y.ok++
		now := time.Now()
		if !y.lastOK.IsZero() {
			y.gap = max(y.gap, now.Sub(y.lastOK))
		}
		y.lastOK = now
	default:
		y.denied++
	}
}

var errOdd = errors.New("error of no class")

func (y *tally) granted() int64 {
	y.mu.Lock()
	defer y.mu.Unlock()
	return y.ok
}

func (y *tally) errors() (n int64) {
	for _, m := range y.failed {
		n += m
	}
	return n
}

func (y *tally) String() string {
	s := fmt.Sprintf("%d granted, %d denied", y.ok, y.denied)
	for c, n := range y.failed {
		s += fmt.Sprintf(", %d %v", n, c)
	}
	return s + fmt.Sprintf("; longest without a grant %v, slowest call %v", y.gap.Round(time.Millisecond), y.slowest.Round(time.Millisecond))
}

// only fails the test if there was an error of another class.
func (y *tally) only(t testing.TB, classes ...error) {
	t.Helper()
	for c, n := range y.failed {
		if !slices.Contains(classes, c) {
			t.Errorf("%d calls failed with %q; accepted: %v", n, c, classes)
			for text, n := range y.texts {
				t.Logf("%d times: %s", n, text)
			}
			for _, e := range y.examples[:min(len(y.examples), 3)] {
				t.Logf("%T: %v", e, e)
			}
			return
		}
	}
}

// bounds fails the test unless granted <= charged <= granted + unknown.
func (y *tally) bounds(t testing.TB, charged int64) {
	t.Helper()
	if most := y.ok + y.failed[quota.ErrIndeterminate]; charged < y.ok || charged > most {
		t.Errorf("%d tokens were charged; accepted: %d, which were granted, to %d, with those whose outcome is unknown", charged, y.ok, most)
	}
}

// exact fails the test unless granted == charged.
func (y *tally) exact(t testing.TB, charged int64) {
	t.Helper()
	if charged != y.ok {
		t.Errorf("%d tokens were charged and %d granted", charged, y.ok)
	}
}

// patience bounds every call of a load: what takes longer hangs.
const patience = 20 * time.Second

// do makes one call and counts it.
func (y *tally) do(ctx context.Context, s quota.Store, c quota.Charge) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	start := time.Now()
	d, err := s.Take(ctx, c)
	y.add(d, err, time.Since(start))
	return err
}

// calls makes n calls of one token each, spread over the keys, from some goroutines.
func calls(s quota.Store, l *quota.Limit, keys []string, n int) *tally {
	y := &tally{}
	const workers = 16
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n; i += workers {
				y.do(bg, s, quota.Charge{Limit: l, Key: keys[i%len(keys)], Cost: 1})
			}
		})
	}
	wg.Wait()
	return y
}

// load makes calls of one token each, spread over the keys, until stop, which returns the outcomes. Its
// pauses keep it from taking all of a machine that other tests need too.
func load(t testing.TB, s quota.Store, l *quota.Limit, keys []string) (y *tally, stop func() *tally) {
	y = &tally{}
	done := make(chan struct{})
	const workers = 8
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; ; i += workers {
				select {
				case <-done:
					return
				default:
				}
				y.do(bg, s, quota.Charge{Limit: l, Key: keys[i%len(keys)], Cost: 1})
				time.Sleep(2 * time.Millisecond)
			}
		})
	}
	stop = sync.OnceValue(func() *tally {
		close(done)
		wg.Wait()
		return y
	})
	t.Cleanup(func() { stop() })
	return y, stop
}

// until waits for something to come true.
func until(t testing.TB, what string, true func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for !true() {
		if time.Since(start) > patience {
			t.Fatalf("waited %v for %s", patience, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return time.Since(start)
}

// more waits until n more calls were granted.
func (y *tally) more(t testing.TB, n int64) {
	t.Helper()
	before := y.granted()
	until(t, "calls to be granted", func() bool { return y.granted() >= before+n })
}

// seed returns a seed that a failing test prints.
var seed = testenv.Seed

// sized returns the size of a test.
var sized = testenv.Sized

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// run runs a command on a server.
func run(t testing.TB, s *redisserver.Server, args ...string) any {
	t.Helper()
	v, err := s.Do(args...)
	if err != nil {
		t.Fatalf("%s: %v", args[0], err)
	}
	return v
}
