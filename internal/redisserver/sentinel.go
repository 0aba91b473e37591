package redisserver

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Sentinel is a master and a replica, watched by three sentinels that take a silent master for down after a
// second.
type Sentinel struct {
	// MasterName is the name under which the sentinels know the master.
	MasterName string
	// Servers are the data servers: the first master, and its replica. Failovers change the roles; see
	// Master.
	Servers []*Server
	// Sentinels are the sentinel processes.
	Sentinels []*Server
}

// StartSentinel starts a Sentinel whose data servers have further arguments of redis-server, and ends it with
// the test. It skips the test on a redis-server before 7.0, whose sentinels greet each other every two seconds, and
// nothing makes them faster.
func StartSentinel(tb testing.TB, args ...string) *Sentinel {
	tb.Helper()
	if Available() == nil && !since(7, 0) {
		tb.Skipf("NOT TESTED: %s needs the sentinels of redis-server 7.0 or newer", tb.Name())
	}
	return start(tb, func(dir string) (*Sentinel, error) { return launchSentinel(dir, args) })
}

// launchSentinel starts a Sentinel that keeps its files in the directory dir, and waits until the sentinels
// agree.
func launchSentinel(dir string, args []string) (_ *Sentinel, err error) {
	s := &Sentinel{MasterName: "fleet"}
	defer func() {
		if err != nil {
			s.Stop()
		}
	}()
	for _, name := range []string{"data-0", "data-1"} {
		sub := filepath.Join(dir, name)
		if err := os.MkdirAll(sub, 0o700); err != nil {
			return nil, err
		}
		c := Config{Args: args}
		if len(s.Servers) > 0 {
			c.Args = append([]string{"--replicaof", loopback, strconv.Itoa(s.Servers[0].port)}, args...)
		}
		server, err := Launch(sub, c)
		if err != nil {
			return nil, err
		}
		s.Servers = append(s.Servers, server)
	}
	// A sentinel reads the replicas from the master when it starts, and again ten seconds later.
	if err := waitFor("the replica", s.replicated); err != nil {
		return nil, s.Servers[1].withLog(err)
	}
	s.Sentinels = make([]*Server, 3)
	err = parallel(len(s.Sentinels), func(i int) error {
		sub := filepath.Join(dir, fmt.Sprint("sentinel-", i))
		if err := os.MkdirAll(sub, 0o700); err != nil {
			return err
		}
		conf := filepath.Join(sub, "sentinel.conf")
		text := fmt.Sprintf("sentinel monitor %[1]s %s %d 2\nsentinel down-after-milliseconds %[1]s 1000\n"+
			"sentinel failover-timeout %[1]s 3000\n", s.MasterName, loopback, s.Servers[0].port)
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			return err
		}
		// A sentinel writes its configuration back, and would find a user twice after a restart.
		sentinel := &Server{dir: sub}
		if err := sentinel.launch([]string{conf, "--sentinel"}, nil); err != nil {
			return err
		}
		s.Sentinels[i] = sentinel
		// By default they greet each other every two seconds, and look at the servers every ten.
		_, err := sentinel.Do("SENTINEL", "DEBUG", "PUBLISH-PERIOD", "100", "INFO-PERIOD", "200")
		return err
	})
	if err == nil {
		err = s.WaitOK()
	}
	if err != nil {
		return nil, err
	}
	for _, sentinel := range s.Sentinels {
		// A sentinel turns a master that it knows as a replica back after four such periods: too short a
		// period, and it undoes the failover that another conducts, which asks the new master for its role
		// once a second.
		if _, err := sentinel.Do("SENTINEL", "DEBUG", "PUBLISH-PERIOD", "1000"); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Stop ends all processes.
func (s *Sentinel) Stop() {
	for _, server := range append(s.Sentinels, s.Servers...) {
		if server != nil {
			server.Stop()
		}
	}
}

// Addrs returns the addresses of the sentinels.
func (s *Sentinel) Addrs() []string {
	var out []string
	for _, sentinel := range s.Sentinels {
		out = append(out, sentinel.Addr())
	}
	return out
}

// Master returns the server that the running sentinels all name as the master, and an error while they
// differ.
func (s *Sentinel) Master() (*Server, error) {
	name := ""
	for _, sentinel := range s.Sentinels {
		if !sentinel.Running() {
			continue
		}
		v, err := sentinel.do(time.Second, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", s.MasterName)
		if err != nil {
			return nil, err
		}
		said := fmt.Sprint(v)
		if name != "" && said != name {
			return nil, fmt.Errorf("redisserver: sentinels differ: %s and %s", name, said)
		}
		name = said
	}
	for _, server := range s.Servers {
		if name == fmt.Sprintf("[%s %d]", loopback, server.port) {
			return server, nil
		}
	}
	return nil, fmt.Errorf("redisserver: no master: %q", name)
}

// Failover makes the replica the master, as an operator does, and returns when the sentinels agree on it. The
// old master stays a master, and takes writes that will be lost, for some four seconds more; WaitOK waits for
// its end.
func (s *Sentinel) Failover() error {
	old, err := s.Master()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(s.Sentinels, (*Server).Running)
	if i < 0 {
		return errors.New("redisserver: no sentinel runs")
	}
	asked := s.Sentinels[i]
	err = waitFor("the failover to begin", func() error {
		_, err := asked.Do("SENTINEL", "FAILOVER", s.MasterName)
		return err
	})
	if err != nil {
		return err
	}
	return s.Sentinels[0].withLog(waitFor("the failover", func() error {
		if now, err := s.Master(); err != nil {
			return err
		} else if now == old {
			// On a loaded machine the sentinel may find the replica too silent, and give up: ask again.
			v, err := asked.do(time.Second, "SENTINEL", "MASTER", s.MasterName)
			if m := pairs(v); err == nil && m["flags"] == "master" && m["port"] == strconv.Itoa(old.port) {
				_, _ = asked.Do("SENTINEL", "FAILOVER", s.MasterName)
			}
			return errors.New("the master is still the same")
		}
		return nil
	}))
}

// WaitOK waits until the running sentinels know each other and agree on a running master, and the other
// server, if it runs, is its replica with a live link. After a failure of the master it returns when the
// failover is complete.
func (s *Sentinel) WaitOK() error {
	err := waitFor("the sentinels to agree", func() error {
		for _, sentinel := range s.Sentinels {
			if !sentinel.Running() {
				continue
			}
			v, err := sentinel.do(time.Second, "SENTINEL", "MASTER", s.MasterName)
			if err != nil {
				return err
			}
			m := pairs(v)
			if m["flags"] != "master" || m["num-other-sentinels"] != strconv.Itoa(len(s.Sentinels)-1) || m["num-slaves"] == "0" {
				return fmt.Errorf("%s sees a master with flags %q, %s replicas and %s sentinels more",
					sentinel.Addr(), m["flags"], m["num-slaves"], m["num-other-sentinels"])
			}
			// A manual failover is refused while the sentinel takes the replica for down or not yet for a
			// replica.
			if v, err = sentinel.do(time.Second, "SENTINEL", "REPLICAS", s.MasterName); err != nil {
				return err
			}
			for _, r := range v.([]any) {
				if m := pairs(r); s.runs(m["port"]) && (m["flags"] != "slave" || m["master-link-status"] != "ok") {
					return fmt.Errorf("%s sees a replica with flags %q, link %q", sentinel.Addr(), m["flags"], m["master-link-status"])
				}
			}
		}
		return s.replicated()
	})
	return s.Servers[0].withLog(err)
}

func (s *Sentinel) runs(port string) bool {
	for _, server := range s.Servers {
		if strconv.Itoa(server.port) == port {
			return server.Running()
		}
	}
	return false
}

// replicated reports whether the master runs and every other running server follows it.
func (s *Sentinel) replicated() error {
	master := s.Servers[0]
	if len(s.Sentinels) > 0 {
		var err error
		if master, err = s.Master(); err != nil {
			return err
		}
	}
	if !master.Running() {
		return errors.New("the master does not run")
	}
	for _, server := range s.Servers {
		if !server.Running() {
			continue
		}
		m, err := server.info(time.Second, "replication")
		if err != nil {
			return err
		}
		if server == master {
			if m["role"] != "master" {
				return fmt.Errorf("%s is a %s", server.Addr(), m["role"])
			}
		} else if m["role"] != "slave" || m["master_port"] != strconv.Itoa(master.port) || m["master_link_status"] != "up" {
			return fmt.Errorf("%s is a %s of port %s, link %s", server.Addr(), m["role"], m["master_port"], m["master_link_status"])
		}
	}
	return nil
}

// pairs makes a map of a flat list of names and values.
func pairs(v any) map[string]string {
	m := make(map[string]string)
	list, _ := v.([]any)
	for i := 0; i+1 < len(list); i += 2 {
		m[strings.ToLower(fmt.Sprint(list[i]))] = fmt.Sprint(list[i+1])
	}
	return m
}
