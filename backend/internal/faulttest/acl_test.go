package faulttest

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

const secret = "s3cret-of-app"

// rights is what the user of a store needs, whichever library it is; on a cluster also clusterRights. INFO
// is for Health only.
const (
	rights        = "~quota:* +evalsha +eval +time +get +set +del +info"
	clusterRights = "+cluster|slots +asking"
)

// plain is an algorithm whose Lua the store does not see, so that it is hosted by compare-and-swap.
type plain struct{ quota.Algorithm }

// everything makes each kind of call that a store has and returns the first error.
func everything(s conn, key string) error {
	limit, hosted := yearly(plenty), quota.Must(quota.NewLimit("hosted", plain{quota.Must(algorithm.FixedWindow(plenty, year))}))
	list := []quota.Charge{{Limit: limit, Key: key, Cost: 1, ID: key}, {Limit: limit, Key: key + "/b", Cost: 1, ID: key}}
	_, err := s.Take(bg, quota.Charge{Limit: limit, Key: key, Cost: 1})
	if err == nil {
		err = s.TakeAll(bg, list, make([]quota.Decision, 2))
	}
	if err == nil {
		_, err = s.Take(bg, quota.Charge{Limit: hosted, Key: key, Cost: 1})
	}
	if err == nil {
		_, err = s.Take(bg, quota.Charge{Limit: limit, Key: key, Op: quota.OpReset})
	}
	if err == nil {
		_, err = s.Health(bg)
	}
	return err
}

// TestMinimalUser runs a store with the fewest rights that work, and shows that each is needed.
func TestMinimalUser(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		server := redisserver.StartConfig(t, redisserver.Config{Users: []string{"app on >" + secret + " " + rights}})
		to := single(server)
		to.user, to.password = "app", secret
		s := l.open(t, to)
		ok(t, everything(s, "first"))
		time.Sleep(1500 * time.Millisecond) // rueidis looks after idle connections
		ok(t, everything(s, "second"))
		all := strings.Fields(rights)
		for i := range all {
			run(t, server, "SCRIPT", "FLUSH")
			left := append(append([]string{"ACL", "SETUSER", "app", "reset", "on", ">" + secret}, all[:i]...), all[i+1:]...)
			run(t, server, left...)
			err := everything(s, "third")
			if class(err) != quota.ErrMisconfigured {
				t.Errorf("without %s: %v; want ErrMisconfigured", all[i], err)
			}
			if all[i] == "+del" { // a list whose reset fails charges nothing else either
				limit := yearly(plenty)
				before := charged(t, s, limit, "fourth/b")
				list := []quota.Charge{{Limit: limit, Key: "fourth/b", Cost: 1}, {Limit: limit, Key: "fourth", Op: quota.OpReset}}
				for range 2 {
					s.Take(bg, quota.Charge{Limit: limit, Key: "fourth", Cost: 1}) // a fresh key has nothing to reset
					if err := s.TakeAll(bg, list, make([]quota.Decision, 2)); class(err) != quota.ErrMisconfigured {
						t.Errorf("a list without %s: %v", all[i], err)
					}
				}
				if n := charged(t, s, limit, "fourth/b"); n != before {
					t.Errorf("a list that failed without %s charged %d", all[i], n-before)
				}
			}
			t.Logf("without %s: %v", all[i], err)
		}
	})
}

// TestMinimalClusterUser does the same on a cluster, with a slot on its way, which takes ASKING.
func TestMinimalClusterUser(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		c := redisserver.StartCluster(t)
		allow := func(rights string) {
			for _, n := range c.Nodes {
				run(t, n.Server, append([]string{"ACL", "SETUSER", "app", "reset", "on", ">" + secret}, strings.Fields(rights)...)...)
			}
		}
		allow(rights + " " + clusterRights)
		to := clustered(c)
		to.user, to.password = "app", secret
		s := l.open(t, to)
		for _, k := range keys(16) {
			ok(t, everything(s, k))
		}
		from, err := c.MasterFor("quota:{moving}:yearly")
		ok(t, err)
		target := c.Nodes[0]
		if target == from {
			target = c.Nodes[1]
		}
		slot := redisserver.Slot("quota:{moving}:yearly")
		ok(t, c.BeginMove(slot, from, target))
		moving := quota.Charge{Limit: yearly(plenty), Key: "moving", Cost: 1}
		if s.fails(moving) {
			t.Error("a charge that is redirected fails")
		}
		allow(rights + " +cluster|slots")
		if _, err := s.Take(bg, moving); class(err) != quota.ErrMisconfigured && class(err) != quota.ErrUnavailable {
			t.Errorf("without +asking: %v", err)
		} else {
			t.Logf("without +asking: %v", err)
		}
		allow(rights)
		fresh, err := l.dial(to)
		if err == nil {
			_, err = fresh.Take(bg, quota.Charge{Limit: yearly(plenty), Key: "k", Cost: 1})
			fresh.close()
		}
		t.Logf("without +cluster|slots: %v", err)
		if err == nil || !strings.Contains(err.Error(), "NOPERM") {
			t.Errorf("without +cluster|slots: %v", err)
		}
		allow(rights + " " + clusterRights)
		if n := charged(t, s, moving.Limit, "moving"); n != 1 {
			t.Errorf("%d charged, not 1", n)
		}
	})
}

// TestWrongPassword changes passwords under a client. Errors name the fault and no secret.
func TestWrongPassword(t *testing.T) {
	const key = "somebody-else"
	for _, c := range []struct {
		name, user   string
		text         []string // of which the error has one
		change, back []string
	}{
		{"user", "app", []string{"WRONGPASS"}, []string{"ACL", "SETUSER", "app", "resetpass", ">another"}, []string{"ACL", "SETUSER", "app", "resetpass", ">" + secret}},
		{"disabled user", "app", []string{"WRONGPASS"}, []string{"ACL", "SETUSER", "app", "off"}, []string{"ACL", "SETUSER", "app", "on"}},
		// go-redis goes on without a password, and the server takes so long a command from nobody.
		{"no password", "", []string{"NOAUTH", "unauthenticated"}, []string{"CONFIG", "SET", "requirepass", "another"}, []string{"CONFIG", "SET", "requirepass", ""}},
	} {
		t.Run(c.name, func(t *testing.T) {
			eachLibrary(t, func(t *testing.T, l library) {
				server := redisserver.StartConfig(t, redisserver.Config{Users: []string{"app on >" + secret + " ~* +@all"}})
				to := single(server)
				if to.user = c.user; c.user != "" {
					to.password = secret
				}
				s := l.open(t, to)
				limit := yearly(plenty)
				y := calls(s, limit, []string{key}, 20)
				run(t, server, c.change...)
				run(t, server, "CLIENT", "KILL", "TYPE", "normal")
				z := calls(s, limit, []string{key}, 60)
				t.Log(z)
				z.only(t, quota.ErrMisconfigured, quota.ErrIndeterminate) // of connections that were broken
				if z.failed[quota.ErrMisconfigured] == 0 {
					t.Error("no error is ErrMisconfigured")
				}
				for text := range z.texts {
					if strings.Contains(text, secret) || strings.Contains(text, key) {
						t.Errorf("the error tells too much: %q", text)
					}
					if strings.Contains(text, "misconfigured") && !slices.ContainsFunc(c.text, func(s string) bool { return strings.Contains(text, s) }) {
						t.Errorf("the error is %q", text)
					}
				}
				run(t, server, c.back...)
				until(t, "the client to recover", func() bool { return !s.fails(quota.Charge{Limit: limit, Key: key, Op: quota.OpPeek}) })
				y.exact(t, charged(t, s, limit, key))
			})
		})
	}
}

// TestForeignKeys uses a key that its user may not touch, and one that holds something else.
func TestForeignKeys(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		server := redisserver.StartConfig(t, redisserver.Config{Users: []string{"app on >" + secret + " ~quota:{mine}* +@all"}})
		to := single(server)
		to.user, to.password = "app", secret
		s := l.open(t, to)
		limit := yearly(plenty)
		list := []quota.Charge{{Limit: limit, Key: "mine", Cost: 1}, {Limit: limit, Key: "hers", Cost: 1}}
		err := s.TakeAll(bg, list, make([]quota.Decision, 2))
		if class(err) != quota.ErrMisconfigured || strings.Contains(err.Error(), "hers") {
			t.Errorf("a key without permission: %v", err)
		}
		run(t, server, "LPUSH", "quota:{mine}/list:yearly", "x")
		list[1].Key = "mine/list"
		if err := s.TakeAll(bg, list, make([]quota.Decision, 2)); class(err) != quota.ErrMisconfigured || !strings.Contains(err.Error(), "WRONGTYPE") {
			t.Errorf("a key of another type: %v", err)
		}
		run(t, server, "SET", "quota:{mine}/text:yearly", "x")
		list[1].Key = "mine/text"
		if err := s.TakeAll(bg, list, make([]quota.Decision, 2)); class(err) != quota.ErrMisconfigured {
			t.Errorf("a key with another value: %v", err)
		}
		if n := charged(t, s, limit, "mine"); n != 0 {
			t.Errorf("%d charged", n)
		}
	})
}
