package redisurl_test

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	_ "github.com/fleetquota/fleetquota/backend/goredis"
	_ "github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

var clients = []string{"goredis", "rueidis"}

// logged is what go-redis logged, which it would write to the standard error.
var logged logs

type logs struct {
	sync.Mutex
	text strings.Builder
}

func (l *logs) Printf(_ context.Context, format string, args ...any) {
	l.Lock()
	defer l.Unlock()
	fmt.Fprintf(&l.text, format+"\n", args...)
}

// take returns what was logged since the last call.
func (l *logs) take() string {
	l.Lock()
	defer l.Unlock()
	defer l.text.Reset()
	return l.text.String()
}

func TestMain(m *testing.M) {
	redis.SetLogger(&logged)
	goleak.VerifyTestMain(m,
		// A cluster client of rueidis that was closed sleeps for up to a second, and for five after a change of nodes.
		goleak.IgnoreAnyFunction("github.com/redis/rueidis.(*call).DelayDo.func1"),
		goleak.IgnoreAnyFunction("github.com/redis/rueidis.(*clusterClient)._refresh.func1"),
		goleak.IgnoreAnyFunction("github.com/redis/rueidis.(*clusterClient)._refresh.func2"))
}

// with runs a test with each client. URLs are completed by the parameter client.
func with(t *testing.T, test func(t *testing.T, open func(testing.TB, string) quota.Store)) {
	for _, client := range clients {
		t.Run(client, func(t *testing.T) {
			test(t, func(tb testing.TB, url string) quota.Store {
				tb.Helper()
				s, err := backend.Open(context.Background(), by(url, client))
				if err != nil {
					tb.Fatal(err)
				}
				tb.Cleanup(func() { s.Close() })
				return s
			})
		})
	}
}

// by adds the parameter client to a URL.
func by(url, client string) string {
	sep := "?"
	if strings.Contains(url, "?") {
		sep = "&"
	}
	return url + sep + "client=" + client
}

var limit = quota.Must(quota.NewLimit("tokens", quota.Must(algorithm.TokenBucket(10, 1, time.Hour))))

func take(s quota.Store, key string) (quota.Decision, error) {
	return s.Take(context.Background(), quota.Charge{Limit: limit, Key: key, Cost: 1})
}

// works checks that a store counts: ten charges fit and no more.
func works(t *testing.T, s quota.Store, key string) {
	t.Helper()
	for n := range int64(11) {
		d, err := take(s, key)
		if err != nil || d.Allowed != (n < 10) || d.Remaining != max(9-n, 0) {
			t.Fatalf("charge %d to %s: %+v, %v", n+1, key, d, err)
		}
	}
}

// eventually waits until a call to the store succeeds and returns how long that took.
func eventually(t *testing.T, s quota.Store, most time.Duration) time.Duration {
	t.Helper()
	start := time.Now()
	for i := 0; ; i++ {
		_, err := take(s, fmt.Sprint("eventually", i%3))
		took := time.Since(start)
		switch {
		case err == nil && took <= most:
			return took
		case took > most:
			t.Fatalf("after %v: %v", took, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// tlsServer starts a server with TLS and returns it with the directory of its certificates.
func tlsServer(t *testing.T, args ...string) (*redisserver.Server, string) {
	t.Helper()
	redisserver.Require(t)
	dir := t.TempDir()
	s, err := redisserver.Launch(dir, redisserver.Config{TLS: true, Args: args})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	return s, dir
}

func ca(dir string) string { return "ca=" + url.QueryEscape(filepath.Join(dir, "ca.crt")) }

// startSentinel starts one sentinel with further lines of configuration, for a master called "fleet", and
// returns its address.
func startSentinel(t *testing.T, master int, lines string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	dir := t.TempDir()
	conf := filepath.Join(dir, "sentinel.conf")
	text := fmt.Sprintf("bind 127.0.0.1\n%s\nsentinel monitor fleet 127.0.0.1 %d 1\n", strings.ReplaceAll(lines, "PORT", strconv.Itoa(port)), master)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	name := "redis-server"
	if other := os.Getenv("FLEETQUOTA_REDIS_SERVER"); other != "" {
		name = other
	}
	cmd := exec.Command(name, conf, "--sentinel")
	cmd.Dir = dir
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
			return addr
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// clusterURL names all nodes of a cluster.
func clusterURL(c *redisserver.Cluster, userinfo, params string) string {
	addrs := c.Addrs()
	return "redis+cluster://" + userinfo + addrs[0] + "?addr=" + strings.Join(addrs[1:], "&addr=") + params
}

func sentinelURL(s *redisserver.Sentinel, userinfo, params string) string {
	addrs := s.Addrs()
	return "redis+sentinel://" + userinfo + addrs[0] + "/2?master=" + s.MasterName + "&addr=" + strings.Join(addrs[1:], "&addr=") + params
}
