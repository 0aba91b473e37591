// Package redisserver starts real redis-server processes for tests and programs, on free loopback ports and
// without persistence, breaks them on purpose (kill, pause, step their clock, fail over, reshard) and stands
// between them and a client (Proxy):
//
//	server := redisserver.Start(t)
//	proxy := redisserver.StartProxy(t, server.Addr())
//	proxy.Inject(redisserver.Fault{Action: redisserver.DropReply, Match: redisserver.Commands("EVALSHA")})
//
// Functions StartX skip a test if there is no redis-server, and end the processes with the test. Programs
// call Launch and LaunchCluster, which return an error, and Stop.
//
// It needs redis-server 6.0 or newer, found in the PATH or named by FLEETQUOTA_REDIS_SERVER.
package redisserver

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	loopback = "127.0.0.1"
	// patience bounds every wait of the package.
	patience = 15 * time.Second
	// admin is the user, and the password, as whom the package itself talks to a server, so that a test can
	// take away every right of the default user.
	admin = "redisserver"
)

// Config says how to start a server. The zero value is a plain server.
type Config struct {
	// Args are further arguments of redis-server, such as "--maxmemory", "3mb". They win over the package's
	// own.
	Args []string
	// Users are ACL users beside the default one, such as "alice on >secret ~quota:* +@all".
	Users []string
	// TLS makes the server speak TLS only; see Server.TLSConfig. Client certificates are not demanded, unless
	// Args contains "--tls-auth-clients", "yes".
	TLS bool
	// FakeTime runs the server under libfaketime, so that Server.SetClock can move its clock.
	FakeTime bool
}

// Server is a redis-server process. Its methods may be called concurrently.
type Server struct {
	dir  string
	port int
	args []string
	env  []string
	tls  *tls.Config
	auth bool
	bus  int // the cluster bus's port, or 0

	mu     sync.Mutex
	proc   *process
	paused bool
	gone   bool
}

type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has been waited for
}

func (p *process) running() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Start starts a plain server with further arguments of redis-server and ends it with the test.
func Start(tb testing.TB, args ...string) *Server {
	tb.Helper()
	return StartConfig(tb, Config{Args: args})
}

// StartConfig starts a server and ends it with the test.
func StartConfig(tb testing.TB, c Config) *Server {
	tb.Helper()
	if c.FakeTime {
		_, err := fakeTimePreload()
		require(tb, err, "faketime", "faketime")
		if err := fakeTimeRuns(); err != nil {
			first, _, _ := strings.Cut(err.Error(), "\n")
			tb.Skipf("NOT TESTED: %s needs a redis-server that runs under faketime: %s", tb.Name(), first)
		}
	}
	return start(tb, func(dir string) (*Server, error) { return Launch(dir, c) })
}

// start launches a part in a directory of a test, and stops it with the test.
func start[T interface{ Stop() }](tb testing.TB, launch func(dir string) (T, error)) T {
	tb.Helper()
	Require(tb)
	part, err := launch(tb.TempDir())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(part.Stop)
	return part
}

// Launch starts a server that keeps its files in the directory dir. The caller must Stop it.
func Launch(dir string, c Config) (*Server, error) {
	s := &Server{dir: dir, auth: true}
	own := []string{"--user", admin, "on", ">" + admin, "~*", "&*", "+@all"}
	for _, u := range c.Users {
		own = append(append(own, "--user"), strings.Fields(u)...)
	}
	if c.FakeTime {
		var err error
		if s.env, err = fakeTimeEnv(s.clockFile()); err != nil {
			return nil, err
		}
		if err = s.SetClock(0); err != nil {
			return nil, err
		}
	}
	if c.TLS {
		var err error
		if s.tls, err = writeCerts(dir); err != nil {
			return nil, err
		}
	}
	if err := s.launch(nil, append(own, c.Args...)); err != nil {
		return nil, err
	}
	return s, nil
}

// launch starts the process on a free port, with the arguments first before the package's own and last after
// them.
func (s *Server) launch(first, last []string) error {
	// A port that was free a moment ago may be taken by now.
	for attempt := 1; ; attempt++ {
		if err := s.reserve(); err != nil {
			return err
		}
		port := []string{"--port", strconv.Itoa(s.port)}
		if s.tls != nil {
			port = []string{"--port", "0", "--tls-port", strconv.Itoa(s.port), "--tls-auth-clients", "no",
				"--tls-cert-file", filepath.Join(s.dir, "redis.crt"), "--tls-key-file", filepath.Join(s.dir, "redis.key"),
				"--tls-ca-cert-file", filepath.Join(s.dir, "ca.crt")}
		}
		if s.bus != 0 {
			port = append(port, "--cluster-port", strconv.Itoa(s.bus))
		}
		s.args = known(slices.Concat(first, port, []string{"--bind", loopback, "--dir", s.dir, "--save", "", "--appendonly", "no",
			"--enable-debug-command", "yes", "--repl-diskless-sync-delay", "0"}, last))
		s.mu.Lock()
		err := s.spawn()
		s.mu.Unlock()
		if err == nil {
			return nil
		}
		s.Stop()
		if !errors.Is(err, errPortTaken) || attempt == 5 {
			return err
		}
		s.gone = false
	}
}

var errPortTaken = errors.New("redisserver: the port is taken")

// spawn starts the process and waits until it answers. The caller holds s.mu.
func (s *Server) spawn() error {
	log, err := os.Create(s.logFile())
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(Binary(), s.args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = s.dir, log, log, sysProcAttr()
	if s.env != nil {
		cmd.Env = s.env
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		// The kernel sends Pdeathsig when the thread that forked ends, not the process: keep that thread.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		_ = cmd.Wait()
		if s.env != nil {
			removeFakeTimeShm(cmd.Process.Pid)
		}
		close(p.done)
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("redisserver: %w", err)
	}
	s.proc, s.paused = p, false
	pid := strconv.Itoa(cmd.Process.Pid)
	err = waitFor("redis-server to answer", func() error {
		if !p.running() {
			if text := s.logTail(); strings.Contains(text, "Address already in use") || strings.Contains(text, "Failed listening") {
				return fatal{errPortTaken}
			}
			return fatal{errors.New("redisserver: redis-server ended at once")}
		}
		info, err := s.info(time.Second, "server")
		if err == nil && info["process_id"] != pid {
			err = errors.New("another redis-server answers")
		}
		return err
	})
	return s.withLog(err)
}

// Restart starts the process again on the same port and in the same directory, with no data; it kills it
// first if it runs.
func (s *Server) Restart() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		return errors.New("redisserver: the server was stopped for good")
	}
	s.kill()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if err := s.spawn(); !errors.Is(err, errPortTaken) || time.Now().After(end) {
			return err
		}
	}
}

// Kill ends the process with SIGKILL and waits until it is gone. Restart brings it back.
func (s *Server) Kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kill()
}

func (s *Server) kill() {
	if s.proc != nil {
		_ = s.proc.cmd.Process.Kill() // it may have ended by itself
		<-s.proc.done
	}
	s.paused = false
}

// Stop ends the process for good. It saves no data, so a kill loses none.
func (s *Server) Stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kill()
	if !s.gone {
		s.gone = true
		releasePorts(s.port, s.bus)
	}
}

// Pause freezes the process with SIGSTOP: it keeps its connections, accepts new ones and answers none of
// them.
func (s *Server) Pause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.proc.running() {
		return errors.New("redisserver: the server does not run")
	}
	if err := s.proc.cmd.Process.Signal(sigStop); err != nil {
		return err
	}
	awaitStopped(s.proc.cmd.Process.Pid)
	s.paused = true
	return nil
}

// Resume lets a paused process go on. It executes the commands that clients sent meanwhile.
func (s *Server) Resume() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.proc.running() {
		return errors.New("redisserver: the server does not run")
	}
	s.paused = false
	return s.proc.cmd.Process.Signal(sigCont)
}

// Running reports whether the process is there and not paused.
func (s *Server) Running() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.proc.running() && !s.paused
}

// Addr returns the server's address, 127.0.0.1:port.
func (s *Server) Addr() string { return net.JoinHostPort(loopback, strconv.Itoa(s.port)) }

// Port returns the server's port. It stays the same over Restart.
func (s *Server) Port() int { return s.port }

// pid returns the process id of the process that was started last.
func (s *Server) pid() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.proc.cmd.Process.Pid
}

// TLSConfig returns the configuration by which a client connects to a server with TLS: the authority that
// signed its certificate, and a client certificate. It is nil for a server without TLS.
func (s *Server) TLSConfig() *tls.Config { return s.tls.Clone() }

// File returns the path of a file in the server's directory. A server with TLS has ca.crt, redis.crt and
// redis.key there.
func (s *Server) File(name string) string { return filepath.Join(s.dir, name) }

// logTail returns the end of the process's log.
func (s *Server) logTail() string {
	b, err := os.ReadFile(s.logFile())
	if err != nil {
		return err.Error()
	}
	if n := len(b) - 4096; n > 0 {
		b = b[n:]
	}
	return string(b)
}

func (s *Server) logFile() string { return filepath.Join(s.dir, "redis.log") }

func (s *Server) withLog(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w\nlog of redis-server %s:\n%s", err, s.Addr(), s.logTail())
}

// Do runs one command on a connection of its own, with every right, and returns a string, an int64, nil or a
// []any of these. An error reply is an Error.
func (s *Server) Do(args ...string) (any, error) { return s.do(patience, args...) }

func (s *Server) do(timeout time.Duration, args ...string) (any, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var conn net.Conn
	var err error
	if s.tls != nil {
		conn, err = (&tls.Dialer{Config: s.tls}).DialContext(ctx, "tcp", s.Addr())
	} else {
		conn, err = new(net.Dialer).DialContext(ctx, "tcp", s.Addr())
	}
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(timeout))
	var request []byte
	if s.auth {
		request = appendCommand(request, "AUTH", admin, admin)
	}
	if _, err := conn.Write(appendCommand(request, args...)); err != nil {
		return nil, err
	}
	r := bufio.NewReader(conn)
	v, err := readReply(r)
	if err == nil && s.auth {
		if e, bad := v.(Error); bad {
			return nil, e
		}
		v, err = readReply(r)
	}
	if err != nil {
		return nil, fmt.Errorf("redisserver: %s %s: %w", s.Addr(), args[0], err)
	}
	if e, bad := v.(Error); bad {
		return nil, e
	}
	return v, nil
}

// Info returns a section of INFO as a map, such as Info("stats")["evicted_keys"].
func (s *Server) Info(section string) (map[string]string, error) { return s.info(patience, section) }

func (s *Server) info(timeout time.Duration, section string) (map[string]string, error) {
	v, err := s.do(timeout, "INFO", section)
	if err != nil {
		return nil, err
	}
	text, _ := v.(string)
	return fields(text), nil
}

// fields parses lines of the form name:value.
func fields(text string) map[string]string {
	m := make(map[string]string)
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			m[k] = v
		}
	}
	return m
}

// SetClock sets the clock of a server that was started with Config.FakeTime to the real time plus offset, at
// once and while it runs. Only the wall clock moves: timers inside the server go on.
func (s *Server) SetClock(offset time.Duration) error {
	if s.env == nil {
		return errors.New("redisserver: SetClock needs Config.FakeTime")
	}
	// The server reads the file each time it asks for the time, so the file must never be seen half written.
	tmp := s.clockFile() + ".tmp"
	if err := os.WriteFile(tmp, fmt.Appendf(nil, "%+.6f\n", offset.Seconds()), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, s.clockFile())
}

func (s *Server) clockFile() string { return filepath.Join(s.dir, "clock") }

// fakeTimeEnv returns the environment that puts a process under libfaketime. The library is preloaded
// directly: faketime itself forks, and the pid would be the wrong one.
func fakeTimeEnv(file string) ([]string, error) {
	preload, err := fakeTimePreload()
	if err != nil {
		return nil, err
	}
	var env []string
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "FAKETIME") && !strings.HasPrefix(kv, "LD_PRELOAD=") {
			env = append(env, kv)
		}
	}
	return append(env, "LD_PRELOAD="+preload, "FAKETIME_TIMESTAMP_FILE="+file, "FAKETIME_NO_CACHE=1",
		// Redis's timers run on the monotonic clock: one step back and serverCron would not run for that
		// long.
		"FAKETIME_DONT_FAKE_MONOTONIC=1", "DONT_FAKE_MONOTONIC=1"), nil
}

var fakeTimePreload = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("faketime", "-f", "+0", "printenv", "LD_PRELOAD").Output()
	if err != nil {
		return "", fmt.Errorf("faketime: %w", err)
	}
	// Debian links redis-server with a shared jemalloc, which asks for the time before libfaketime is ready,
	// and the process hangs. Loading libc ahead of it gives the process glibc's malloc.
	return string(bytes.TrimSpace(out)) + ":libc.so.6", nil
})

// fakeTimeRuns returns an error if the server does not start under libfaketime: one that comes with a C library of its
// own does not.
var fakeTimeRuns = sync.OnceValue(func() error {
	if os.Getenv(binaryVariable) == "" {
		return nil
	}
	dir, err := os.MkdirTemp("", "faketime")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	s, err := Launch(dir, Config{FakeTime: true})
	if err == nil {
		s.Stop()
	}
	return err
})

// removeFakeTimeShm removes the files that libfaketime leaves in /dev/shm when its process is killed.
func removeFakeTimeShm(pid int) {
	for _, name := range []string{"faketime_shm_", "sem.faketime_sem_"} {
		_ = os.Remove("/dev/shm/" + name + strconv.Itoa(pid))
	}
}

// binaryVariable names the redis-server that the package starts.
const binaryVariable = "FLEETQUOTA_REDIS_SERVER"

// Binary returns the name of the redis-server that the package starts.
func Binary() string {
	if name := os.Getenv(binaryVariable); name != "" {
		return name
	}
	return "redis-server"
}

// version returns the major and the minor version of the redis-server that the package starts.
var version = sync.OnceValues(func() (v [2]int, err error) {
	out, err := exec.Command(Binary(), "--version").Output()
	if err != nil {
		return v, err
	}
	m := regexp.MustCompile(`v=(\d+)\.(\d+)`).FindSubmatch(out)
	if m == nil {
		return v, fmt.Errorf("%s --version answers %q", Binary(), out)
	}
	v[0], _ = strconv.Atoi(string(m[1]))
	v[1], _ = strconv.Atoi(string(m[2]))
	if v[0] < 6 {
		return v, fmt.Errorf("redis-server is too old: %s", bytes.TrimSpace(out))
	}
	return v, nil
})

// since says whether the redis-server that the package starts is of this version or a newer one.
func since(major, minor int) bool {
	v, _ := version()
	return v[0] > major || v[0] == major && v[1] >= minor
}

// known returns the arguments that the redis-server knows: older ones allow of themselves what these ask for.
func known(args []string) []string {
	kept := make([]string, 0, len(args))
	for i := 0; i < len(args); i++ {
		switch args[i] {
		case "&*": // the rights on channels
			if !since(6, 2) {
				continue
			}
		case "--enable-debug-command", "--cluster-port":
			if !since(7, 0) {
				i++
				continue
			}
		}
		kept = append(kept, args[i])
	}
	return kept
}

// Available returns nil if there is a redis-server that the package can use, and otherwise the error that it
// meets.
func Available() error {
	_, err := version()
	return err
}

// Require skips the test, with a message that says how to change that, if there is no redis-server. With
// FLEETQUOTA_REQUIRE_REDIS=1 in the environment it fails the test instead. Functions StartX call it.
func Require(tb testing.TB) {
	tb.Helper()
	require(tb, Available(), "a real redis-server, version 6.0 or newer", "redis-server")
}

func require(tb testing.TB, err error, what, pkg string) {
	tb.Helper()
	if err == nil {
		return
	}
	text := fmt.Sprintf("NOT TESTED: %s needs %s: %v. Get it with: apt-get install %s", tb.Name(), what, err, pkg)
	if os.Getenv("FLEETQUOTA_REQUIRE_REDIS") == "1" {
		tb.Fatal(text, "(FLEETQUOTA_REQUIRE_REDIS=1 forbids skipping.)")
	} else {
		tb.Skip(text)
	}
}

// Ports come from below the ephemeral range of Linux (32768 and up), so that no outgoing connection takes a
// port between the check and the bind, or while a killed server is away. A client that dials a free port of
// the ephemeral range in a loop may even connect to itself.
const portMin, portMax = 10000, 32767

var ports = struct {
	sync.Mutex
	taken map[int]bool
}{taken: make(map[int]bool)}

// reserve chooses free ports that no other server of this process has.
func (s *Server) reserve() (err error) {
	if s.port, err = freePort(); err == nil && s.bus != 0 {
		if s.bus = s.port + 10000; since(7, 0) { // older ones have it there
			s.bus, err = freePort()
		}
	}
	return err
}

func freePort() (int, error) {
	ports.Lock()
	defer ports.Unlock()
	for range 1000 {
		port := portMin + rand.IntN(portMax-portMin)
		if ports.taken[port] {
			continue
		}
		l, err := net.Listen("tcp", net.JoinHostPort(loopback, strconv.Itoa(port)))
		if err != nil {
			continue
		}
		l.Close()
		ports.taken[port] = true
		return port, nil
	}
	return 0, errors.New("redisserver: no free port")
}

func releasePorts(list ...int) {
	ports.Lock()
	defer ports.Unlock()
	for _, p := range list {
		delete(ports.taken, p)
	}
}

// fatal is an error for which waitFor does not wait any longer.
type fatal struct{ error }

func (f fatal) Unwrap() error { return f.error }

// waitFor calls ready until it returns nil, with a growing pause, and gives up after patience with the last
// error.
func waitFor(what string, ready func() error) error {
	end := time.Now().Add(patience)
	for pause := time.Millisecond; ; pause = min(2*pause, 25*time.Millisecond) {
		err := ready()
		if err == nil || errors.As(err, new(fatal)) {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("redisserver: waited %v for %s: %w", patience, what, err)
		}
		time.Sleep(pause)
	}
}

// parallel calls f for 0…n-1 at once and joins the errors.
func parallel(n int, f func(i int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = f(i) })
	}
	wg.Wait()
	return errors.Join(errs...)
}
