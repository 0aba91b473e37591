package clienttest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var bg = context.Background()

const (
	year = 365 * 24 * time.Hour
	// plenty is more than any test takes.
	plenty = 1 << 20
	// patience bounds every wait, and every call of a load: a call that takes longer hangs.
	patience = 20 * time.Second
)

// seed returns a seed that a failing test prints; sized returns the size of a test.
var (
	seed  = testenv.Seed
	sized = testenv.Sized
)

// volume is sized for tests that only compute: an eighth under the race detector, which is slow, and a third of that with the
// second client, whose engine is that of the first.
func (l library) volume(reduced, whole int) int {
	if raceEnabled {
		reduced /= 8
	}
	if l.name != libraries[0].name {
		reduced /= 3
	}
	return sized(reduced, whole)
}

// spared is the pause of a goroutine that makes calls until it is stopped, and a longer one under the race detector, whose calls
// take several times as much of the machine.
func spared(usual, race time.Duration) time.Duration {
	if raceEnabled && !testenv.Full() {
		return race
	}
	return usual
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// until waits for something to come true, and returns after how long it was still untrue: when the last try that failed
// began. What a busy machine takes to look is not in it.
func until(t testing.TB, what string, true func() bool) (untrue time.Duration) {
	t.Helper()
	start := time.Now()
	for try := start; !true(); try = time.Now() {
		untrue = try.Sub(start)
		if time.Since(start) > patience {
			t.Fatalf("waited %v for %s", patience, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return untrue
}

// Servers, and looks at them past the store.

// data looks at the keys and counts of a server, or a cluster.
type data struct {
	redis.UniversalClient
	conn conn // the client under test
}

// single starts a server, connects, and returns the server's data with a function that opens stores. The stores ask
// no questions of their own: they take the server for the only one.
func (l library) single(t testing.TB) (*data, func(engine.Options) store) {
	t.Helper()
	s := redisserver.Start(t)
	raw := redis.NewClient(&redis.Options{Addr: s.Addr()})
	t.Cleanup(func() { raw.Close() })
	return vouched(l.data(t, raw, single(s)))
}

// vouched gives stores engine.BatchAll unless their options say otherwise.
func vouched(s *data, open func(engine.Options) store) (*data, func(engine.Options) store) {
	return s, func(o engine.Options) store {
		if o.Batching == engine.BatchAuto && !o.Strict {
			o.Batching = engine.BatchAll
		}
		return open(o)
	}
}

// cluster does the same with a cluster.
func (l library) cluster(t testing.TB) (*data, func(engine.Options) store) {
	t.Helper()
	c := redisserver.StartCluster(t)
	raw := redis.NewClusterClient(&redis.ClusterOptions{Addrs: c.Addrs()})
	t.Cleanup(func() { raw.Close() })
	return l.data(t, raw, clustered(c))
}

func (l library) data(t testing.TB, raw redis.UniversalClient, to target) (*data, func(engine.Options) store) {
	t.Helper()
	to.pool, to.timeout = 32, patience
	s := &data{raw, l.dial(t, to)}
	return s, func(o engine.Options) store {
		t.Helper()
		store, err := s.conn.open(o)
		ok(t, err)
		t.Cleanup(func() { store.Close() })
		return store
	}
}

// held returns the state that stores of the default prefix keep for a limit and key.
func (s *data) held(t testing.TB, c quota.Charge) string {
	t.Helper()
	v, err := s.Get(bg, place(c)).Result()
	if err != nil && err != redis.Nil {
		t.Error(err)
	}
	return v
}

// expires returns when the server drops a key, in ms since the epoch; below 0 for no key.
func (s *data) expires(t testing.TB, key string) int64 {
	t.Helper()
	at, err := s.PExpireTime(bg, key).Result()
	if err != nil {
		t.Error(err)
	}
	if at < 0 {
		return -1
	}
	return at.Milliseconds()
}

// stats are a server's counts of one command.
type stats struct{ calls, failed int }

// count returns the counts of commands since the last CONFIG RESETSTAT.
func (s *data) count(t testing.TB) map[string]stats {
	t.Helper()
	info, err := s.Info(bg, "commandstats").Result()
	ok(t, err)
	counts := map[string]stats{}
	for line := range strings.Lines(info) {
		head, fields, _ := strings.Cut(strings.TrimSpace(line), ":")
		if name, found := strings.CutPrefix(head, "cmdstat_"); found {
			counts[name] = stats{number(fields, "calls="), number(fields, "failed_calls=")}
		}
	}
	return counts
}

// number returns the number of a field such as calls=17 in a list of fields.
func number(fields, name string) int {
	for field := range strings.SplitSeq(fields, ",") {
		if text, found := strings.CutPrefix(field, name); found {
			n, _ := strconv.Atoi(text)
			return n
		}
	}
	return 0
}

func (s *data) resetCounts(t testing.TB) {
	t.Helper()
	ok(t, s.ConfigResetStat(bg).Err())
}

// place returns the key of a charge's state under the default prefix.
func place(c quota.Charge) string {
	return string(driver.AppendKey([]byte("quota:"), c.Limit.Name(), c.Key))
}

// do runs a command on a server.
func do(t testing.TB, s *redisserver.Server, args ...string) any {
	t.Helper()
	v, err := s.Do(args...)
	if err != nil {
		t.Fatalf("%s: %v", args[0], err)
	}
	return v
}

// versionOf returns a server's own version, not the version of Redis that it claims to match.
func versionOf(t testing.TB, s *redisserver.Server) string {
	t.Helper()
	info, err := s.Info("server")
	ok(t, err)
	if v := info["valkey_version"]; v != "" {
		return v
	}
	return info["redis_version"]
}

// runs returns how many of the engine's scripts the servers ran since they started: each asks for the time
// once.
func runs(t testing.TB, servers ...*redisserver.Server) (n int64) {
	t.Helper()
	for _, s := range servers {
		stats, err := s.Info("commandstats")
		ok(t, err)
		n += int64(number(stats["cmdstat_time"], "calls="))
	}
	return n
}

func servers(c *redisserver.Cluster) (list []*redisserver.Server) {
	for _, n := range c.Nodes {
		list = append(list, n.Server)
	}
	return list
}

// countKeys counts the keys of a database that begin with a prefix.
func countKeys(t testing.TB, s *redisserver.Server, db, prefix string) int64 {
	t.Helper()
	return do(t, s, "EVAL", "redis.call('SELECT', ARGV[1]) return #redis.call('KEYS', ARGV[2])", "0", db, strings.ReplaceAll(prefix, "/", "?")+"{*").(int64)
}

// site is a server, or a cluster, with a proxy before each of its servers.
type site struct {
	direct  target
	proxies *redisserver.Proxies
	servers []*redisserver.Server
}

func (p site) through() target { return p.direct.through(p.proxies) }

// eachSite runs a test on a server and on a cluster.
func eachSite(t *testing.T, f func(t *testing.T, p site)) {
	t.Run("single", func(t *testing.T) {
		t.Parallel()
		s := redisserver.Start(t)
		f(t, site{single(s), redisserver.StartProxies(t, s.Addr()), []*redisserver.Server{s}})
	})
	t.Run("cluster", func(t *testing.T) {
		t.Parallel()
		c := redisserver.StartCluster(t)
		f(t, site{clustered(c), redisserver.StartProxies(t, c.Addrs()...), servers(c)})
	})
}

// startSentinel starts one sentinel with further lines of configuration, in which PORT is its port, for a
// master called "fleet", and returns its address. The sentinels of redisserver have neither TLS nor
// passwords.
func startSentinel(t *testing.T, master int, lines string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	addr := l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(addr)
	conf := filepath.Join(t.TempDir(), "sentinel.conf")
	text := fmt.Sprintf("bind 127.0.0.1\n%s\nsentinel monitor fleet 127.0.0.1 %d 1\n", strings.ReplaceAll(lines, "PORT", port), master)
	ok(t, os.WriteFile(conf, []byte(text), 0o600))
	cmd := exec.Command(redisserver.Binary(), conf, "--sentinel")
	ok(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	until(t, "the sentinel", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return addr
}

// tlsServer starts a server with TLS.
func tlsServer(t *testing.T, args ...string) *redisserver.Server {
	t.Helper()
	return redisserver.StartConfig(t, redisserver.Config{TLS: true, Args: args})
}

// ca is the parameter of a URL that names a server's authority.
func ca(s *redisserver.Server) string { return "ca=" + url.QueryEscape(s.File("ca.crt")) }

// by adds the parameter client to a URL.
func by(url, client string) string {
	sep := "?"
	if strings.Contains(url, "?") {
		sep = "&"
	}
	return url + sep + "client=" + client
}

// clusterURL names all nodes of a cluster.
func clusterURL(c *redisserver.Cluster, userinfo string) string {
	addrs := c.Addrs()
	return "redis+cluster://" + userinfo + addrs[0] + "?addr=" + strings.Join(addrs[1:], "&addr=")
}

// sentinelURL names all sentinels, and database 2.
func sentinelURL(s *redisserver.Sentinel) string {
	addrs := s.Addrs()
	return "redis+sentinel://" + addrs[0] + "/2?master=" + s.MasterName + "&addr=" + strings.Join(addrs[1:], "&addr=")
}

// Limits, charges and errors.

func limitOf(name string, a quota.Algorithm) *quota.Limit { return quota.NewLimit(name, a) }

// yearly returns a limit whose counts stay while a test runs; counted returns the one that tests of faults
// count with.
func yearly(name string, n int64) *quota.Limit {
	return limitOf(name, algorithm.FixedWindow(n, year))
}

func counted(n int64) *quota.Limit { return yearly("yearly", n) }

// hidden is an algorithm whose Lua the store does not see, so that compare-and-swap decides. Its spec is
// another, by a parameter without a meaning: a store plans for a spec once.
type hidden struct{ quota.Algorithm }

func (h hidden) Spec() quota.Spec {
	s := h.Algorithm.Spec()
	s.Params[5] = 1
	return s
}

// take decides one charge and fails the test on an error.
func take(t testing.TB, s quota.Store, c quota.Charge) quota.Decision {
	t.Helper()
	d, err := s.Charge(bg, c)
	if err != nil {
		t.Fatalf("%s of %d from %s: got error %v, want none", c.Op, c.Cost, c.Limit.Name(), err)
	}
	return d
}

// chargeAll decides a list and fails the test on an error.
func chargeAll(t testing.TB, s quota.Store, cs ...quota.Charge) []quota.Decision {
	t.Helper()
	out := make([]quota.Decision, len(cs))
	ok(t, s.ChargeAll(bg, cs, out))
	return out
}

// left returns the tokens that a key has.
func left(t testing.TB, s quota.Store, l *quota.Limit, key string) int64 {
	t.Helper()
	return take(t, s, quota.Charge{Limit: l, Key: key, Op: quota.OpPeek}).Remaining
}

// charged returns the tokens that the keys of a limit have consumed, as the server holds them.
func charged(t testing.TB, s quota.Store, l *quota.Limit, keys ...string) (n int64) {
	t.Helper()
	for _, k := range keys {
		n += l.Spec().Capacity - left(t, s, l, k)
	}
	return n
}

// fails reports whether a call fails.
func (c conn) fails(charge quota.Charge) bool {
	_, err := c.Charge(bg, charge)
	return err != nil
}

// keys returns n keys of as many groups, which fall all over a cluster.
func keys(n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = "team-" + strconv.Itoa(i)
	}
	return list
}

func show(cs ...quota.Charge) string {
	var b strings.Builder
	for i := range cs {
		c := &cs[i]
		fmt.Fprintf(&b, "\n  %s %d (at %d, within %v, least %d, above %d of %d, shadow %v, list %d) of %s %+v for %q", c.Op, c.Cost, c.MadeAt, c.Within, c.Least, c.Floor, c.FloorOf, c.Shadow, c.Alternative, c.Limit.Name(), *c.Limit.Spec(), c.Key)
	}
	return b.String()
}

// classes are the errors of which exactly one must match.
var classes = []error{
	quota.ErrInvalid, quota.ErrUnavailable, quota.ErrIndeterminate, quota.ErrConflict, quota.ErrCrossSlot, quota.ErrOverloaded,
	quota.ErrMisconfigured, quota.ErrClosed,
}

// errUncertain is the class of an error of a script that may have charged, by a fault of the configuration.
var errUncertain = errors.New("ErrIndeterminate and ErrMisconfigured")

// class returns the class of an error. An error of none, such as a context's, is its own.
func class(err error) error {
	if errors.Is(err, quota.ErrIndeterminate) && errors.Is(err, quota.ErrMisconfigured) {
		return errUncertain
	}
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

// is fails the test unless an error has a class; nil is no error.
func is(t testing.TB, call string, err, want error) {
	t.Helper()
	if class(err) != want {
		t.Errorf("%s: got error %v, want %v", call, err, want)
	}
}
