// Package pgserver starts real PostgreSQL servers for tests and programs, each in a directory of its own and on a free
// loopback port, breaks them on purpose, and stands between them and a client (Proxy):
//
//	server := pgserver.Start(t)
//	pool, err := pgxpool.New(ctx, server.URL("postgres"))
//
// Start skips a test if PostgreSQL is not installed, and ends the server with the test. Programs call Launch, which
// returns an error, and Stop.
//
// It needs PostgreSQL 14 or newer: FLEETQUOTA_POSTGRES_BIN names the directory of initdb and postgres; without it they
// are looked for in the PATH and where Debian keeps them. PostgreSQL refuses to run as root, so a process of root starts
// it as the user postgres, or else nobody.
package pgserver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	loopback = "127.0.0.1"
	// patience bounds every wait of the package.
	patience = 30 * time.Second
	// PasswordUser is a user who may log in with a password only. A test creates it.
	PasswordUser = "passworded"
)

// Server is a PostgreSQL server. Its methods may be called concurrently.
type Server struct {
	dir        string
	attributes *syscall.SysProcAttr
	port       int
	args       []string

	mu   sync.Mutex
	proc *process
	gone bool
}

type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has been waited for
}

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Start starts a server with further settings, such as "max_connections=10", and ends it with the test. The server does
// not wait for the disk.
func Start(tb testing.TB, settings ...string) *Server {
	tb.Helper()
	Require(tb)
	s, err := Launch(slices.Concat([]string{"fsync=off", "full_page_writes=off"}, settings)...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(s.Stop)
	return s
}

// Launch starts a server with settings beside PostgreSQL's own, and waits until it answers. The caller must Stop it.
func Launch(settings ...string) (_ *Server, err error) {
	bin, err := binaries()
	if err != nil {
		return nil, err
	}
	dir, attributes, err := Unprivileged()
	s := &Server{dir: dir, attributes: attributes}
	defer func() {
		if err != nil {
			s.Stop()
		}
	}()
	if err != nil {
		return nil, err
	}
	init := exec.Command(filepath.Join(bin, "initdb"), "-D", s.File("data"), "-U", "postgres", "-A", "trust", "-E", "UTF8",
		"--locale=C", "--no-sync", "--no-instructions")
	init.Dir, init.SysProcAttr, init.Env = dir, attributes, s.environment()
	if out, err := init.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("pgserver: initdb: %w\n%s", err, out)
	}
	hba := "host all " + PasswordUser + " 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\nlocal all all trust\n"
	if err := os.WriteFile(s.File("data/pg_hba.conf"), []byte(hba), 0o600); err != nil {
		return nil, err
	}
	for _, setting := range slices.Concat([]string{"listen_addresses=" + loopback, "unix_socket_directories=", "max_connections=200",
		"shared_buffers=64MB", "log_min_messages=fatal"}, settings) {
		s.args = append(s.args, "-c", setting)
	}
	s.args = append([]string{"-D", s.File("data")}, s.args...)
	// A port that was free a moment ago may be taken by now.
	for range 5 {
		if s.port, err = FreePort(); err != nil {
			return nil, err
		}
		if err = s.spawn(bin); !errors.Is(err, errPortTaken) {
			break
		}
	}
	return s, err
}

// Unprivileged makes a directory, and returns it with attributes of processes that may write there and are not
// root's: in a process of root they run as the user postgres, or else nobody. The caller must remove the directory.
func Unprivileged() (dir string, _ *syscall.SysProcAttr, err error) {
	if dir, err = os.MkdirTemp("", "pgserver"); err != nil || os.Geteuid() != 0 {
		return dir, attributes(-1, -1), err
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		return dir, attributes(uid, gid), os.Chown(dir, uid, gid)
	}
	return dir, nil, errors.New("pgserver: PostgreSQL does not run as root, and there is no user postgres or nobody")
}

// environment is the process's own, without settings of PostgreSQL's clients.
func (s *Server) environment() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "PG") })
}

var errPortTaken = errors.New("pgserver: the port is taken")

// spawn starts the process and waits until it answers.
func (s *Server) spawn(bin string) error {
	log, err := os.Create(s.File("log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(bin, "postgres"), append(slices.Clone(s.args), "-p", strconv.Itoa(s.port))...)
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr, cmd.Env = s.dir, log, log, s.attributes, s.environment()
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		// The kernel tells the server of the end of the thread that forked, not of the process: keep that thread.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("pgserver: %w", err)
	}
	s.proc = p
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if !p.running() {
			text, _ := os.ReadFile(s.File("log"))
			if strings.Contains(string(text), "Address already in use") {
				return errPortTaken
			}
			return fmt.Errorf("pgserver: postgres ended at once:\n%s", text)
		}
		err := s.answers()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			text, _ := os.ReadFile(s.File("log"))
			return fmt.Errorf("pgserver: waited %v for postgres: %w\n%s", patience, err, text)
		}
	}
}

// answers returns nil if the server lets the user postgres in.
func (s *Server) answers() error {
	conn, err := net.DialTimeout("tcp", s.Addr(), time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Second))
	const protocol = 3 << 16
	hello := binary.BigEndian.AppendUint32(make([]byte, 4), protocol)
	hello = append(hello, "user\x00postgres\x00database\x00postgres\x00\x00"...)
	binary.BigEndian.PutUint32(hello, uint32(len(hello)))
	if _, err := conn.Write(hello); err != nil {
		return err
	}
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return err
	}
	if answer[0] != 'R' {
		return fmt.Errorf("its first message is of type %q", answer[0])
	}
	return nil
}

// Stop ends the server for good, and removes its directory.
func (s *Server) Stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kill()
	if !s.gone {
		s.gone = true
		os.RemoveAll(s.dir)
	}
}

// Kill ends the server at once, as a crash does: connections are cut, and it recovers when it is started again.
func (s *Server) Kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kill()
}

func (s *Server) kill() {
	if s.proc != nil {
		_ = s.proc.cmd.Process.Signal(immediateShutdown) // it may have ended by itself
		<-s.proc.done
		s.proc = nil
	}
}

// Restart starts the server again, on the same port and with its data; it kills it first if it runs. Further settings
// win over those that it had.
func (s *Server) Restart(settings ...string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		return errors.New("pgserver: the server was stopped for good")
	}
	s.kill()
	for _, setting := range settings {
		s.args = append(s.args, "-c", setting)
	}
	bin, err := binaries()
	if err != nil {
		return err
	}
	return s.spawn(bin)
}

// Addr returns the server's address, 127.0.0.1:port.
func (s *Server) Addr() string { return net.JoinHostPort(loopback, strconv.Itoa(s.port)) }

// URL returns the URL by which a user connects to the database postgres, without TLS.
func (s *Server) URL(user string) string { return URL(user, s.Addr()) }

// URL returns the URL by which a user connects to the database postgres at an address, without TLS.
func URL(user, addr string) string {
	return "postgres://" + user + "@" + addr + "/postgres?sslmode=disable"
}

// File returns the path of a file in the server's directory. The server's settings and data are in data.
func (s *Server) File(name string) string { return filepath.Join(s.dir, filepath.FromSlash(name)) }

// binaries returns the directory of initdb and postgres.
var binaries = sync.OnceValues(func() (string, error) {
	const variable = "FLEETQUOTA_POSTGRES_BIN"
	if dir := os.Getenv(variable); dir != "" {
		return dir, nil
	}
	if path, err := exec.LookPath("postgres"); err == nil {
		return filepath.Dir(path), nil
	}
	newest, best := "", 0
	dirs, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	for _, dir := range dirs {
		version, _ := strconv.Atoi(filepath.Base(filepath.Dir(dir)))
		if _, err := os.Stat(filepath.Join(dir, "postgres")); err == nil && version > best {
			newest, best = dir, version
		}
	}
	if newest == "" {
		return "", fmt.Errorf("there is no postgres in the PATH, and %s is not set", variable)
	}
	return newest, nil
})

// Available returns an error if there is no server to start.
func Available() error {
	_, err := binaries()
	return err
}

// Require skips a test, and says so, if there is no server to start. FLEETQUOTA_REQUIRE_POSTGRES=1 makes that a failure.
func Require(tb testing.TB) {
	tb.Helper()
	err := Available()
	if err == nil {
		return
	}
	text := fmt.Sprintf("NOT TESTED: %s needs a PostgreSQL server: %v. Get it with: apt-get install postgresql", tb.Name(), err)
	if os.Getenv("FLEETQUOTA_REQUIRE_POSTGRES") == "1" {
		tb.Fatal(text, "(FLEETQUOTA_REQUIRE_POSTGRES=1 forbids skipping.)")
	} else {
		tb.Skip(text)
	}
}

// FreePort returns a port that is free, from below the ephemeral range of Linux, so that no outgoing connection takes it
// before the server does.
func FreePort() (int, error) {
	for range 1000 {
		port := 10000 + rand.IntN(22000)
		if l, err := net.Listen("tcp", net.JoinHostPort(loopback, strconv.Itoa(port))); err == nil {
			return port, l.Close()
		}
	}
	return 0, errors.New("pgserver: no free port")
}
