package faulttest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// TestContext ends contexts before and during calls.
func TestContext(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		server := redisserver.Start(t)
		proxies := redisserver.StartProxies(t, server.Addr())
		s := l.open(t, single(server).through(proxies))
		limit := yearly(plenty)
		c := quota.Charge{Limit: limit, Key: "k", Cost: 1}
		_, err := s.Take(bg, c)
		ok(t, err)
		before := runs(t, server)

		canceled, cancel := context.WithCancel(bg)
		cancel()
		late, cancel := context.WithDeadline(bg, time.Now().Add(-time.Second))
		defer cancel()
		for _, ctx := range []context.Context{canceled, late} {
			_, one := s.Take(ctx, c)
			_, health := s.Health(ctx)
			all := s.TakeAll(ctx, []quota.Charge{c, {Limit: limit, Key: "k/b", Cost: 1}}, make([]quota.Decision, 2))
			for _, err := range []error{one, all, health} {
				if err != ctx.Err() {
					t.Errorf("a context that is done gives %v, not %v", err, ctx.Err())
				}
			}
		}
		if n := runs(t, server); n != before {
			t.Errorf("a context that is done sent %d scripts", n-before)
		}

		proxies.Inject(redisserver.Fault{Action: redisserver.DelayReply, Match: redisserver.Commands("EVALSHA"), Delay: 300 * time.Millisecond})
		ctx, cancel := context.WithTimeout(bg, 50*time.Millisecond)
		defer cancel()
		start := time.Now()
		_, err = s.Take(ctx, c)
		t.Logf("deadline of 50ms: %v after %v", err, time.Since(start).Round(time.Millisecond))
		if class(err) != quota.ErrIndeterminate || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a deadline that passes in flight: %v", err)
		}
		ctx, cancel = context.WithCancel(bg)
		time.AfterFunc(50*time.Millisecond, cancel)
		start = time.Now()
		_, err = s.Take(ctx, c)
		t.Logf("cancelled after 50ms: %v after %v", err, time.Since(start).Round(time.Millisecond))
		// go-redis does not heed cancellation: it waits, and gets its answer.
		if err != nil && (class(err) != quota.ErrIndeterminate || !errors.Is(err, context.Canceled)) {
			t.Errorf("cancelled in flight: %v", err)
		}
		proxies.Clear()
		until(t, "the late charges", func() bool { return charged(t, s, limit, "k") == 3 })
	})
}

// TestPoolExhausted lets callers wait for the only connection longer than the client has patience. They go alone,
// for together they may all go at once.
func TestPoolExhausted(t *testing.T) {
	t.Parallel()
	server := redisserver.Start(t)
	proxies := redisserver.StartProxies(t, server.Addr())
	to := single(server).through(proxies)
	to.pool, to.timeout, to.alone = 1, 500*time.Millisecond, true
	s := libraries[0].open(t, to)
	limit := yearly(plenty)
	until(t, "the connection", func() bool { return !s.fails(quota.Charge{Limit: limit, Key: keys(1)[0], Op: quota.OpPeek}) })
	proxies.Inject(redisserver.Fault{Action: redisserver.DelayReply, Match: redisserver.Commands("EVALSHA"), Delay: 300 * time.Millisecond})
	y := calls(s, limit, keys(1), 16)
	t.Log(y)
	y.only(t, quota.ErrOverloaded, quota.ErrIndeterminate)
	if y.failed[quota.ErrOverloaded] == 0 {
		t.Error("no call found the pool exhausted")
	}
	proxies.Clear()
	y.bounds(t, charged(t, s, limit, keys(1)...))
}

// TestClose closes stores over a client that is the caller's.
func TestClose(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		server := redisserver.Start(t)
		s := l.open(t, single(server))
		c := quota.Charge{Limit: yearly(plenty), Key: "k", Cost: 1}
		_, err := s.Take(bg, c)
		ok(t, err)
		before := runs(t, server)
		ok(t, s.Close())
		ok(t, s.Close())
		_, one := s.Take(bg, c)
		_, health := s.Health(bg)
		all := s.TakeAll(bg, []quota.Charge{c}, make([]quota.Decision, 1))
		for _, err := range []error{one, all, health} {
			if class(err) != quota.ErrClosed {
				t.Errorf("after Close: %v", err)
			}
		}
		if n := runs(t, server); n != before {
			t.Error("a closed store sent something")
		}
		if err := s.ping(); err != nil {
			t.Errorf("the caller's client after Store.Close: %v", err)
		}
		// A client that its owner closed under a store.
		open := l.open(t, single(server))
		open.close()
		_, err = open.Take(bg, c)
		t.Log("the client was closed: ", err)
		if got := class(err); got != quota.ErrClosed && got != quota.ErrIndeterminate {
			t.Errorf("the client was closed: %v", err)
		}
	})
}

// TestConstructedDown makes a store whose server is not there, and starts the server afterwards. rueidis
// makes no client then; see TestOpenedDown.
func TestConstructedDown(t *testing.T) {
	t.Parallel()
	l := libraries[0]
	server := redisserver.Start(t)
	cluster := redisserver.StartCluster(t)
	server.Kill()
	for _, n := range cluster.Nodes {
		n.Kill()
	}
	for _, to := range []target{single(server), clustered(cluster)} {
		start := time.Now()
		s := l.open(t, to)
		if took := time.Since(start); took > time.Second {
			t.Errorf("New took %v", took)
		}
		_, err := s.Take(bg, quota.Charge{Limit: yearly(plenty), Key: "k", Cost: 1})
		t.Logf("%v after %v", err, time.Since(start).Round(time.Millisecond))
		if class(err) != quota.ErrUnavailable {
			t.Errorf("nobody is there: %v", err)
		}
		if !to.cluster {
			ok(t, server.Restart())
			until(t, "the client to connect", func() bool { return !s.fails(quota.Charge{Limit: yearly(plenty), Key: "k", Cost: 1}) })
		}
	}
}

// TestOpenedDown opens a URL whose server is not there, and starts the server afterwards.
func TestOpenedDown(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		server := redisserver.Start(t)
		server.Kill()
		start := time.Now()
		s, err := backend.Open(bg, "redis://"+server.Addr()+"?client="+l.name)
		ok(t, err)
		defer s.Close()
		if took := time.Since(start); took > time.Second {
			t.Errorf("Open took %v", took)
		}
		c := quota.Charge{Limit: yearly(plenty), Key: "k", Cost: 1}
		if _, err := s.Take(bg, c); class(err) != quota.ErrUnavailable {
			t.Errorf("nobody is there: %v", err)
		}
		ok(t, server.Restart())
		back := until(t, "the client to connect", func() bool {
			_, err := s.Take(bg, c)
			return err == nil
		})
		t.Logf("connected after %v", back.Round(time.Millisecond))
		if n := charged(t, s, c.Limit, "k"); n != 1 {
			t.Errorf("%d charged, not 1", n)
		}
	})
}
