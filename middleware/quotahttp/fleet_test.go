package quotahttp_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/fleetquota/fleetquota/backend"
	_ "github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
)

// fleetURL is the variable in which a process of TestFleet finds its store.
const fleetURL = "QUOTAHTTP_FLEET_URL"

var perClient = limit("requests: 20 burst 2/s bucket")

func TestMain(m *testing.M) {
	if url := os.Getenv(fleetURL); url != "" {
		if err := process(url); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// process is one process of a fleet: it writes its address, and serves until its input ends.
func process(store string) error {
	s, err := backend.Open(context.Background(), store)
	if err != nil {
		return err
	}
	limiter, err := quota.NewLimiter(s, perClient, nil)
	if err != nil {
		return err
	}
	defer limiter.Close()
	limits, err := quotahttp.New(limiter, nil, quotahttp.By(quotahttp.IP(quotahttp.ProxyCount(1))))
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(listener.Addr())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		listener.Close()
	}()
	_ = http.Serve(listener, limits(http.HandlerFunc(ok))) // ends with the listener
	return nil
}

// TestFleet: four processes behind a reverse proxy, on one Redis. Clients that invent addresses get no more
// than one client's limit, and a client that waits as long as its 429 says gets 200.
func TestFleet(t *testing.T) {
	redisserver.Require(t)
	server := redisserver.Start(t)
	var targets []*url.URL
	for range 4 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), fleetURL+"=redis://"+server.Addr())
		cmd.Stderr = os.Stderr
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			stdin.Close()
			if err := cmd.Wait(); err != nil && t.Context().Err() == nil {
				t.Errorf("process: got %v, want none", err)
			}
		})
		line, err := bufio.NewReader(stdout).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		targets = append(targets, &url.URL{Scheme: "http", Host: strings.TrimSpace(line)})
	}
	var turn atomic.Int64
	connections := &http.Transport{MaxIdleConnsPerHost: 16}
	defer connections.CloseIdleConnections()
	proxy := httptest.NewServer(&httputil.ReverseProxy{Transport: connections, Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(targets[turn.Add(1)%int64(len(targets))])
		r.Out.Header["X-Forwarded-For"] = r.In.Header["X-Forwarded-For"] // which is appended to
		r.SetXForwarded()
	}})
	defer proxy.Close()
	client := proxy.Client()
	send := func() (status int, after time.Duration) {
		r, err := http.NewRequestWithContext(t.Context(), "GET", proxy.URL, nil)
		if err != nil {
			t.Error(err)
			return 0, 0
		}
		r.Header.Set("X-Forwarded-For", fmt.Sprintf("203.0.113.%d", turn.Load()%250))
		resp, err := client.Do(r)
		if err != nil {
			t.Error(err)
			return 0, 0
		}
		defer resp.Body.Close()
		_, _ = io.Copy(io.Discard, resp.Body)
		seconds, err := strconv.Atoi(resp.Header.Get("Retry-After"))
		if (resp.StatusCode == 429) != (err == nil && seconds >= 1) || resp.StatusCode != 429 && resp.StatusCode != 200 {
			t.Errorf("answer: got %d, Retry-After %q; want 200, or 429 and a time", resp.StatusCode, resp.Header.Get("Retry-After"))
		}
		return resp.StatusCode, time.Duration(seconds) * time.Second
	}

	var granted, denied atomic.Int64
	began := time.Now()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 25 {
				if status, _ := send(); status == 200 {
					granted.Add(1)
				} else {
					denied.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if most := 20 + int64(2*time.Since(began).Seconds()) + 1; granted.Load() < 20 || granted.Load() > most || denied.Load() == 0 {
		t.Errorf("200 requests at once: got %d granted, %d denied; want 20 to %d granted", granted.Load(), denied.Load(), most)
	}
	for range 3 {
		status, after := send()
		for status == 200 {
			status, after = send()
		}
		select { // the test is of the time that the answer tells
		case <-time.After(after):
		case <-t.Context().Done():
		}
		if status, _ := send(); status != 200 {
			t.Errorf("answer after a wait of %v, as told: got %d, want 200", after, status)
		}
	}
}
