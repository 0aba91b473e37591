package redisserver

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	before := runtime.NumGoroutine()
	code := m.Run()
	for range 200 {
		if runtime.NumGoroutine() <= before {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if n := runtime.NumGoroutine(); n > before {
		buf := make([]byte, 1<<20)
		fmt.Printf("%d goroutines left behind:\n%s\n", n-before, buf[:runtime.Stack(buf, true)])
		code = 1
	}
	if left := children(); len(left) > 0 {
		fmt.Println("processes left behind:", left)
		code = 1
	}
	os.Exit(code)
}

// children returns the processes that this one started and that are still there.
func children() (out []string) {
	lists, _ := os.ReadDir("/proc/self/task")
	for _, l := range lists {
		b, _ := os.ReadFile("/proc/self/task/" + l.Name() + "/children")
		out = append(out, strings.Fields(string(b))...)
	}
	return out
}

func must[T any](t testing.TB) func(T, error) T {
	t.Helper()
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// client is one connection that a test drives by hand.
type client struct {
	net.Conn
	r *bufio.Reader
}

func dial(t testing.TB, addr string) *client {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	ok(t, err)
	return wrap(t, conn)
}

func wrap(t testing.TB, conn net.Conn) *client {
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	return &client{conn, bufio.NewReader(conn)}
}

func (c *client) send(args ...string) error {
	_, err := c.Write(appendCommand(nil, args...))
	return err
}

func (c *client) do(args ...string) (any, error) {
	if err := c.send(args...); err != nil {
		return nil, err
	}
	return readReply(c.r)
}

func TestServer(t *testing.T) {
	t.Parallel()
	start := time.Now()
	s := Start(t, "--maxmemory", "3mb")
	t.Log("start:", time.Since(start))

	if v := must[any](t)(s.Do("CONFIG", "GET", "maxmemory")); fmt.Sprint(v) != "[maxmemory 3145728]" {
		t.Errorf("CONFIG GET maxmemory: got %v, want 3145728", v)
	}
	if _, err := s.Do("NONSENSE"); !errors.As(err, new(Error)) {
		t.Errorf("an unknown command: got error %T, want an Error", err)
	}
	must[any](t)(s.Do("SET", "k", "v"))
	if v, err := s.Do("GET", "none"); v != nil || err != nil {
		t.Errorf("GET of a missing key: got %v, %v; want nil and no error", v, err)
	}
	if info := must[map[string]string](t)(s.Info("server")); info["process_id"] != strconv.Itoa(s.pid()) {
		t.Errorf("process_id: got %s, want %d", info["process_id"], s.pid())
	}
	must[any](t)(s.Do("DEBUG", "SLEEP", "0.01"))

	c := dial(t, s.Addr())
	ok(t, s.Pause())
	if s.Running() {
		t.Error("Running of a paused server: got true, want false")
	}
	ok(t, c.send("SET", "late", "1"))
	_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := c.r.ReadByte(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a paused server: got error %v, want a deadline", err)
	}
	c.Close()
	ok(t, s.Resume())
	ok(t, waitFor("the late command", func() error {
		if v, err := s.Do("GET", "late"); err != nil || v != "1" {
			return fmt.Errorf("GET late: got %v, %v; want 1", v, err)
		}
		return nil
	}))

	s.Kill()
	if s.Running() {
		t.Error("Running of a killed server: got true, want false")
	}
	if _, err := net.Dial("tcp", s.Addr()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial to a killed server: got error %v, want a refusal", err)
	}
	pid := s.pid()
	start = time.Now()
	ok(t, s.Restart())
	t.Log("restart:", time.Since(start))
	if v := must[any](t)(s.Do("DBSIZE")); v != int64(0) || s.pid() == pid {
		t.Errorf("after a restart: got %v keys, pid %d → %d; want no key and another pid", v, pid, s.pid())
	}
	s.Stop()
	if err := s.Restart(); err == nil {
		t.Error("Restart after Stop: got no error, want one")
	}
}

func TestLaunchReportsTheLog(t *testing.T) {
	t.Parallel()
	Require(t)
	if _, err := Launch(t.TempDir(), Config{Args: []string{"--no-such-option", "1"}}); err == nil || !strings.Contains(err.Error(), "Bad directive") {
		t.Errorf("got error %v, want the log's", err)
	}
}

func TestPortTaken(t *testing.T) {
	t.Parallel()
	s := Start(t)
	s.Kill()
	l, err := net.Listen("tcp", s.Addr())
	ok(t, err)
	time.AfterFunc(200*time.Millisecond, func() { l.Close() })
	ok(t, s.Restart())
}

func TestUsers(t *testing.T) {
	t.Parallel()
	s := StartConfig(t, Config{Users: []string{"alice on >secret ~quota:* -@all +get +set +auth", "default off"}})
	c := dial(t, s.Addr())
	if v := must[any](t)(c.do("GET", "quota:a")); !strings.HasPrefix(fmt.Sprint(v), "NOAUTH") {
		t.Errorf("without a user: got %v, want NOAUTH", v)
	}
	if v := must[any](t)(c.do("AUTH", "alice", "secret")); v != "OK" {
		t.Errorf("AUTH: got %v, want OK", v)
	}
	if v := must[any](t)(c.do("SET", "quota:a", "1")); v != "OK" {
		t.Errorf("SET of an allowed key: got %v, want OK", v)
	}
	if v := must[any](t)(c.do("SET", "other", "1")); !strings.HasPrefix(fmt.Sprint(v), "NOPERM") {
		t.Errorf("SET of another key: got %v, want NOPERM", v)
	}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{nil, {"--tls-auth-clients", "yes"}} {
		s := StartConfig(t, Config{TLS: true, Args: args})
		conn, err := tls.Dial("tcp", s.Addr(), s.TLSConfig())
		ok(t, err)
		if v := must[any](t)(wrap(t, conn).do("PING")); v != "PONG" {
			t.Errorf("PING: got %v, want PONG", v)
		}
		if _, err := tls.Dial("tcp", s.Addr(), &tls.Config{}); err == nil {
			t.Error("an unknown authority: got no error, want one")
		}
	}
}

func TestSetClock(t *testing.T) {
	t.Parallel()
	s := StartConfig(t, Config{FakeTime: true})
	check := func(offset time.Duration) {
		t.Helper()
		ok(t, s.SetClock(offset))
		now := must[any](t)(s.Do("TIME")).([]any)
		seconds, _ := strconv.ParseInt(now[0].(string), 10, 64)
		if d := time.Until(time.Unix(seconds, 0)) - offset; d > 500*time.Millisecond || d < -1500*time.Millisecond { // a second is cut off
			t.Errorf("at offset %v: got a clock that is off by %v, want half a second at most", offset, d)
		}
	}
	check(0)
	must[any](t)(s.Do("SET", "k", "v", "PX", "60000"))
	check(time.Hour)
	if v := must[any](t)(s.Do("GET", "k")); v != nil {
		t.Errorf("the key after a step forward: got %v, want none", v)
	}
	check(-24 * time.Hour)
	for i := range 20 {
		check(time.Duration(i%2) * 1500 * time.Millisecond)
	}
	// Redis's own timers go on after a step back.
	ok(t, s.SetClock(-time.Hour))
	must[any](t)(s.Do("SET", "k", "v", "PX", "100"))
	ok(t, waitFor("the key to expire by itself", func() error {
		if v, err := s.Do("DBSIZE"); err != nil || v != int64(0) {
			return fmt.Errorf("got %v keys, %v; want none", v, err)
		}
		return nil
	}))
	pid := strconv.Itoa(s.pid())
	ok(t, s.Restart())
	check(-2 * time.Hour)
	if _, err := os.Stat("/dev/shm/faketime_shm_" + pid); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("libfaketime's shared memory: got error %v, want none left", err)
	}
	if err := Start(t).SetClock(time.Hour); err == nil {
		t.Error("SetClock without FakeTime: got no error, want one")
	}
}

func TestSentinel(t *testing.T) {
	t.Parallel()
	start := time.Now()
	s := StartSentinel(t)
	t.Log("start:", time.Since(start))
	if len(s.Addrs()) != 3 {
		t.Errorf("Addrs: got %v, want three", s.Addrs())
	}
	first := must[*Server](t)(s.Master())
	start = time.Now()
	ok(t, s.Failover())
	t.Log("manual failover:", time.Since(start))
	second := must[*Server](t)(s.Master())
	if second == first {
		t.Fatal("the master is the same after a failover")
	}
	start = time.Now()
	ok(t, s.WaitOK())
	t.Log("until the old master is a replica:", time.Since(start))
	start = time.Now()
	second.Kill()
	ok(t, s.WaitOK())
	t.Log("failover after a kill:", time.Since(start))
	if now := must[*Server](t)(s.Master()); now != first {
		t.Errorf("master after a kill: got %s, want %s", now.Addr(), first.Addr())
	}
	start = time.Now()
	ok(t, second.Restart())
	ok(t, s.Sentinels[0].Restart())
	ok(t, s.WaitOK())
	t.Log("back:", time.Since(start))
}

func TestCluster(t *testing.T) {
	t.Parallel()
	start := time.Now()
	c := StartCluster(t)
	t.Log("start:", time.Since(start))
	if len(c.Addrs()) != 6 || c.node(c.Nodes[4].ID) != c.Nodes[4] {
		t.Errorf("Addrs: got %v, want six, of which each has its node", c.Addrs())
	}

	const tag = "{team-7}"
	slot := Slot(tag)
	from := must[*Node](t)(c.MasterFor(tag))
	if v := must[any](t)(from.Do("CLUSTER", "KEYSLOT", tag)); v != int64(slot) {
		t.Errorf("Slot: got %d, want the server's %v", slot, v)
	}
	for i := range 250 {
		must[any](t)(from.Do("SET", fmt.Sprint(tag, i), "v"))
	}
	to := c.Nodes[(slices.Index(c.Nodes, from)+1)%masters]
	ok(t, c.BeginMove(slot, from, to))
	if _, err := from.Do("GET", tag+"none"); err == nil || !strings.HasPrefix(err.Error(), "ASK ") {
		t.Errorf("a slot on its way: got error %v, want ASK", err)
	}
	start = time.Now()
	ok(t, c.MoveSlot(slot, from, to))
	t.Log("move of a slot:", time.Since(start))
	if now := must[*Node](t)(c.MasterForSlot(slot)); now != to {
		t.Errorf("master of the slot: got %s, want %s", now.Addr(), to.Addr())
	}
	if v := must[any](t)(to.Do("CLUSTER", "COUNTKEYSINSLOT", strconv.Itoa(slot))); v != int64(250) {
		t.Errorf("keys that arrived: got %v, want 250", v)
	}

	start = time.Now()
	promoted := must[*Node](t)(c.Failover(to))
	t.Log("manual failover:", time.Since(start))
	if now := must[*Node](t)(c.MasterForSlot(slot)); now != promoted || now == to {
		t.Errorf("master after a failover: got %s, want %s", now.Addr(), promoted.Addr())
	}
	start = time.Now()
	promoted.Kill()
	ok(t, c.WaitOK())
	t.Log("failover after a kill:", time.Since(start))
	if now := must[*Node](t)(c.MasterForSlot(slot)); now != to {
		t.Errorf("master after a kill: got %s, want %s", now.Addr(), to.Addr())
	}
	start = time.Now()
	ok(t, promoted.Restart())
	ok(t, c.WaitOK())
	t.Log("back:", time.Since(start))
	if r := must[[]*Node](t)(c.Replicas(to)); len(r) != 1 || r[0] != promoted {
		t.Errorf("Replicas: got %v, want the one that was promoted", r)
	}

	ps := StartProxies(t, c.Addrs()...)
	drops := ps.Inject(Fault{Match: Commands("SET")})
	conn, err := ps.DialContext(t.Context(), "tcp", to.Addr())
	ok(t, err)
	if _, err = wrap(t, conn).do("SET", tag, "v"); !errors.Is(err, io.EOF) || drops.Fired() != 1 {
		t.Errorf("SET through a proxy that drops it: got error %v and %d drops, want EOF and 1", err, drops.Fired())
	}
	if _, err := ps.DialContext(t.Context(), "tcp", "127.0.0.1:1"); err == nil {
		t.Error("an address without a proxy: got no error, want one")
	}
}

func TestMoveSlotUnderLoad(t *testing.T) {
	t.Parallel()
	c := StartCluster(t)
	const tag = "{team-7}"
	from := must[*Node](t)(c.MasterFor(tag))
	to := c.Nodes[(slices.Index(c.Nodes, from)+1)%masters]
	var acked atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := incr(c, from, fmt.Sprint(tag, w, ":", i%50)); err != nil {
					t.Error(err)
					return
				}
				acked.Add(1)
			}
		})
	}
	for range 2 {
		ok(t, c.MoveSlot(Slot(tag), from, to))
		ok(t, c.MoveSlot(Slot(tag), to, from))
	}
	close(stop)
	wg.Wait()
	var sum int64
	for w := range 4 {
		for i := range 50 {
			if v := must[any](t)(from.Do("GET", fmt.Sprint(tag, w, ":", i))); v != nil {
				n, _ := strconv.ParseInt(v.(string), 10, 64)
				sum += n
			}
		}
	}
	if sum != acked.Load() {
		t.Errorf("increments kept: got %d, want the %d that were acknowledged", sum, acked.Load())
	}
	t.Log("increments:", sum)
}

// incr follows redirections.
func incr(c *Cluster, n *Node, key string) error {
	asking := false
	for range 10 {
		conn, err := net.Dial("tcp", n.Addr())
		if err != nil {
			return err
		}
		cl := &client{conn, bufio.NewReader(conn)}
		if asking {
			if _, err := cl.do("ASKING"); err != nil {
				return err
			}
		}
		v, err := cl.do("INCR", key)
		conn.Close()
		if err != nil {
			return err
		}
		e, bad := v.(Error)
		if !bad {
			return nil
		}
		f := strings.Fields(string(e))
		if len(f) != 3 || f[0] != "MOVED" && f[0] != "ASK" {
			return e
		}
		asking = f[0] == "ASK"
		n = c.Nodes[slices.Index(c.Addrs(), f[2])]
	}
	return errors.New("too many redirections")
}

func TestProxy(t *testing.T) {
	t.Parallel()
	s := Start(t)
	p := StartProxy(t, s.Addr())
	count := func() string { return fmt.Sprint(must[any](t)(s.Do("GET", "n"))) }
	reset := func() { p.Clear(); must[any](t)(s.Do("SET", "n", "0")) }

	reset()
	if v, err := dial(t, p.Addr()).do("INCR", "n"); v != int64(1) || err != nil {
		t.Errorf("without a fault: got %v, %v; want 1", v, err)
	}

	reset()
	second := func() func([]string) bool { // the second INCR
		n := 0
		return func(args []string) bool {
			if !Commands("incr")(args) {
				return false
			}
			n++
			return n == 2
		}
	}
	i := p.Inject(Fault{Action: DropReply, Match: second()})
	c := dial(t, p.Addr())
	for range 2 { // a pipeline
		ok(t, c.send("PING"))
		ok(t, c.send("INCR", "n"))
	}
	for k, want := range []any{"PONG", int64(1), "PONG"} {
		if v := must[any](t)(readReply(c.r)); v != want {
			t.Errorf("reply %d: got %v, want %v", k, v, want)
		}
	}
	if v, err := readReply(c.r); err != io.EOF {
		t.Errorf("a dropped reply: got %v, %v; want EOF", v, err)
	}
	if count() != "2" || i.Fired() != 1 {
		t.Errorf("dropped reply: got %s executed and %d fired, want 2 and 1", count(), i.Fired())
	}

	reset()
	p.Inject(Fault{Action: DropRequest, Match: second()})
	c = dial(t, p.Addr())
	ok(t, c.send("INCR", "n"))
	ok(t, c.send("INCR", "n"))
	if v := must[any](t)(readReply(c.r)); v != int64(1) {
		t.Errorf("the reply before a dropped request: got %v, want 1", v)
	}
	if _, err := readReply(c.r); err != io.EOF || count() != "1" {
		t.Errorf("a dropped request: got %v and %s executed, want EOF and 1", err, count())
	}

	for _, a := range []Action{DelayReply, DelayRequest} {
		reset()
		p.Inject(Fault{Action: a, Delay: 60 * time.Millisecond})
		start := time.Now()
		if v, err := dial(t, p.Addr()).do("INCR", "n"); v != int64(1) || err != nil || time.Since(start) < 60*time.Millisecond {
			t.Errorf("action %d: got %v, %v after %v; want 1 after 60ms", a, v, err, time.Since(start))
		}
	}

	// The client leaves before its request arrives.
	reset()
	p.Inject(Fault{Action: DelayRequest, Delay: 50 * time.Millisecond})
	c = dial(t, p.Addr())
	ok(t, c.send("INCR", "n"))
	time.Sleep(20 * time.Millisecond)
	c.Close()
	ok(t, waitFor("the late request", func() error {
		if count() != "1" {
			return errors.New("not yet")
		}
		return nil
	}))

	reset()
	var places [2][]int // of the requests that met the fault
	for k := range places {
		i := p.Inject(Fault{Action: DelayReply, Every: 4, Seed: 7})
		c := dial(t, p.Addr())
		for n := range 200 {
			must[any](t)(c.do("PING"))
			if i.Fired() > len(places[k]) {
				places[k] = append(places[k], n)
			}
		}
		p.Clear()
	}
	if !slices.Equal(places[0], places[1]) {
		t.Errorf("requests that met a fault with one seed: got %v, then %v; want the same", places[0], places[1])
	}
	offsets := map[int]bool{}
	for k, n := range places[0] {
		offsets[n%4] = true
		if n/4 != k {
			t.Fatalf("requests that met a fault: got %v, want one of each four", places[0])
		}
	}
	if len(places[0]) != 50 || len(offsets) != 4 {
		t.Errorf("of 200 requests met a fault: got %v, want 50 at all places among four", places[0])
	}

	// RESP3: pushes are no replies.
	c = dial(t, p.Addr())
	ok(t, c.send("HELLO", "3"))
	ok(t, c.send("CLIENT", "TRACKING", "ON", "BCAST"))
	b, kind, err := appendFrame(nil, c.r)
	if kind != '%' || err != nil {
		t.Errorf("HELLO: got %q, %v; want a map", b, err)
	}
	must[any](t)(readReply(c.r))
	must[any](t)(s.Do("SET", "x", "1"))
	if b, kind, err := appendFrame(nil, c.r); kind != '>' || err != nil {
		t.Errorf("got %q, %v; want a push", b, err)
	}
	p.Inject(Fault{Match: Commands("ECHO")})
	if v := must[any](t)(c.do("PING")); v != "PONG" {
		t.Errorf("PING: got %v, want PONG", v)
	}
	if _, err := c.do("ECHO", "x"); err != io.EOF {
		t.Errorf("ECHO: got error %v, want EOF", err)
	}

	p.Clear()
	c = dial(t, p.Addr())
	must[any](t)(c.do("SUBSCRIBE", "ch"))
	must[any](t)(s.Do("PUBLISH", "ch", "hello"))
	if v := must[any](t)(readReply(c.r)); fmt.Sprint(v) != "[message ch hello]" {
		t.Errorf("message: got %v, want hello on ch", v)
	}
	p.Reset()
	if _, err := readReply(c.r); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("after Reset: got error %v, want ECONNRESET", err)
	}
	s.Kill()
	if conn, err := net.Dial("tcp", p.Addr()); err == nil { // the reset may come even earlier
		if _, err := wrap(t, conn).do("PING"); err == nil {
			t.Error("a proxy before a dead server: got an answer, want none")
		}
	}
}

// fakeTB records how a test ended.
type fakeTB struct {
	testing.TB
	skipped, failed string
}

func (*fakeTB) Helper()             {}
func (f *fakeTB) Skip(args ...any)  { f.skipped = fmt.Sprint(args...) }
func (f *fakeTB) Fatal(args ...any) { f.failed = fmt.Sprint(args...) }

func TestRequire(t *testing.T) {
	t.Setenv("FLEETQUOTA_REQUIRE_REDIS", "")
	tb := &fakeTB{TB: t}
	require(tb, nil, "", "")
	if tb.skipped+tb.failed != "" {
		t.Errorf("available: got %+v, want neither skipped nor failed", tb)
	}
	require(tb, errors.New("not found"), "faketime", "faketime")
	if !strings.Contains(tb.skipped, "apt-get install faketime") || tb.failed != "" {
		t.Errorf("missing: got %+v, want skipped", tb)
	}
	t.Setenv("FLEETQUOTA_REQUIRE_REDIS", "1")
	tb = &fakeTB{TB: t}
	if require(tb, errors.New("not found"), "faketime", "faketime"); tb.failed == "" || tb.skipped != "" {
		t.Errorf("required: got %+v, want failed", tb)
	}
}

func BenchmarkProxy(b *testing.B) {
	p := StartProxy(b, Start(b).Addr())
	c := dial(b, p.Addr())
	_ = c.SetDeadline(time.Time{})
	for b.Loop() {
		must[any](b)(c.do("PING"))
	}
}
