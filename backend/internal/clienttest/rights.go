package clienttest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

const secret = "s3cret-of-app"

// The rights of a user must suffice, and none may be unneeded. The documentation has the same lines.
var (
	rights        = []string{"~quota:*", "+evalsha", "+eval", "+time", "+get", batchRight, "+set", "+del", scanRight}
	serverRights  = []string{infoRight} // of a server that is no cluster's
	rueidisRights = []string{"+ping"}
	clusterRights = []string{"+cluster|slots"}
	shardsRight   = "+cluster|shards" // for rueidis from version 8 of a server on
)

const (
	databaseRight = "+select"
	batchRight    = "+mget"   // to read the keys of a batch at once
	scanRight     = "+scan"   // for listings
	infoRight     = "+info"   // for Health, and to know whether there is one server
	movingRight   = "+asking" // while a slot is on its way from one node to another
)

func rightsOf(client string, cluster bool) []string {
	list := slices.Clone(rights)
	if !cluster {
		list = append(list, serverRights...)
	}
	if client == "rueidis" {
		list = append(list, rueidisRights...)
	}
	if cluster {
		list = append(list, clusterRights...)
	}
	return list
}

// rightsOn are the rights on these servers.
func rightsOn(t *testing.T, client string, cluster bool, user app) []string {
	t.Helper()
	list := rightsOf(client, cluster)
	first, _, _ := strings.Cut(versionOf(t, user[0]), ".")
	if major, err := strconv.Atoi(first); err == nil && major >= 8 && client == "rueidis" && cluster {
		list = append(list, shardsRight)
	}
	return list
}

// use makes each kind of call that a store has, and returns the first error.
func use(s quota.Store, group string) error {
	bucket := algorithm.TokenBucket(10, 1, time.Hour)
	log := algorithm.SlidingWindowLog(10, time.Hour)
	for i := range 4 {
		key := fmt.Sprint(group, i)
		list := []quota.Charge{{Limit: limitOf("bucket", bucket), Key: key, Cost: 1}, {Limit: limitOf("log", log), Key: key, Cost: 1}, {Limit: limitOf("cas", hidden{bucket}), Key: key, Cost: 1}}
		for _, c := range list {
			for _, op := range []quota.Op{quota.OpTake, quota.OpPeek, quota.OpDebit, quota.OpRefund, quota.OpReset} {
				c.Op = op
				if _, err := s.Charge(bg, c); err != nil {
					return fmt.Errorf("%s %v: %w", c.Limit.Name(), op, err)
				}
			}
			c.Op, c.ID = quota.OpTake, c.Limit.Name()
			if _, err := s.Charge(bg, c); err != nil {
				return fmt.Errorf("%s with an id: %w", c.Limit.Name(), err)
			}
		}
		for _, n := range []int{2, 3} {
			if err := s.ChargeAll(bg, list[:n], make([]quota.Decision, n)); err != nil {
				return fmt.Errorf("a list: %w", err)
			}
		}
	}
	return nil
}

// app is a user on some servers.
type app []*redisserver.Server

// may gives the user these rights and no other, and lets the servers forget refusals and scripts.
func (a app) may(t *testing.T, rights ...string) {
	t.Helper()
	for _, s := range a {
		do(t, s, append([]string{"ACL", "SETUSER", "app", "reset", "on", ">" + secret}, rights...)...)
		do(t, s, "ACL", "LOG", "RESET")
		do(t, s, "SCRIPT", "FLUSH")
	}
}

// refused returns the servers' log of refusals.
func (a app) refused(t *testing.T) (log []any) {
	t.Helper()
	for _, s := range a {
		log = append(log, do(t, s, "ACL", "LOG").([]any)...)
	}
	return log
}

// rightsNeeded runs stores with the fewest rights that work, and shows that each is needed.
func rightsNeeded(t *testing.T, l library) {
	t.Run("single", func(t *testing.T) {
		t.Parallel()
		server := redisserver.Start(t)
		needed(t, l, app{server}, false, "redis://app:"+secret+"@"+server.Addr(), single(server))
	})
	t.Run("cluster", func(t *testing.T) {
		t.Parallel()
		c := redisserver.StartCluster(t)
		needed(t, l, servers(c), true, "redis+cluster://app:"+secret+"@"+c.Addrs()[0], clustered(c))
	})
}

func needed(t *testing.T, l library, user app, cluster bool, url string, own target) {
	list := rightsOn(t, l.name, cluster, user)
	user.may(t, list...)
	s := l.open(t, patiently(url))
	ok(t, use(s, "first"))
	time.Sleep(1500 * time.Millisecond) // rueidis looks after its connections
	ok(t, use(s, "second"))
	if log := user.refused(t); len(log) > 0 {
		t.Errorf("with %v: got refusals %v, want none", list, log)
	}
	_, _, err := backend.List(bg, s, backend.Listing{})
	ok(t, err)
	own.user, own.password = "app", secret
	ok(t, use(l.dial(t, own), "own")) // a client of the caller's, which may be refused commands that it can do without
	health := func(s quota.Store) error { _, err := s.(driver.HealthReporter).Health(bg); return err }
	blind := slices.DeleteFunc(slices.Clone(list), func(right string) bool { return right == infoRight })
	user.may(t, blind...)
	is(t, "Health without "+infoRight, health(s), quota.ErrMisconfigured)
	user.may(t, append(blind, infoRight)...)
	is(t, "Health with "+infoRight, health(l.open(t, patiently(url))), nil)

	for i, right := range list {
		user.may(t, slices.Delete(slices.Clone(list), i, i+1)...)
		s := l.open(t, patiently(url))
		err := use(s, "third")
		if right == "+ping" { // the client is not told that it was refused, but the server's log is
			ok(t, err)
			until(t, "a PING to be refused", func() bool { return strings.Contains(fmt.Sprint(user.refused(t)), "object ping") })
			continue
		}
		if right == infoRight { // see batchingNoRight
			ok(t, err)
			until(t, "an INFO to be refused", func() bool { return strings.Contains(fmt.Sprint(user.refused(t)), "object info") })
			continue
		}
		if right == batchRight { // which GET makes up for, key by key
			ok(t, err)
			if log := fmt.Sprint(user.refused(t)); !strings.Contains(log, "object mget") {
				t.Errorf("without %s: got refusals %s, want some of it", right, log)
			}
			continue
		}
		if right == scanRight {
			ok(t, err)
			if _, _, err := backend.List(bg, s, backend.Listing{}); class(err) != quota.ErrMisconfigured || !strings.Contains(err.Error(), "the user lacks +scan; accepted: ") {
				t.Errorf("a listing without %s: got error %v, want ErrMisconfigured with the cure", right, err)
			}
			continue
		}
		is(t, "without "+right, err, quota.ErrMisconfigured)
		if right == "+del" {
			failedReset(t, s)
		}
	}
	user.may(t, list...)
	_, err = one(l.open(t, patiently(url+"?prefix=other:")), "k")
	is(t, "keys of another prefix", err, quota.ErrMisconfigured)
	if !cluster {
		is(t, "a database without "+databaseRight, use(l.open(t, patiently(url+"/1")), "k"), quota.ErrMisconfigured)
		user.may(t, append(slices.Clone(list), databaseRight)...)
		ok(t, use(l.open(t, patiently(url+"/1")), "k"))
	}
}

// failedReset: a list whose reset fails, for the user may not delete, charges no other key either.
func failedReset(t *testing.T, s quota.Store) {
	limit := counted(plenty)
	list := []quota.Charge{{Limit: limit, Key: "reset/b", Cost: 1}, {Limit: limit, Key: "reset", Op: quota.OpReset}}
	before := charged(t, s, limit, "reset/b")
	s.Charge(bg, quota.Charge{Limit: limit, Key: "reset", Cost: 1}) // a fresh key has no state to reset
	is(t, "a list whose reset fails", s.ChargeAll(bg, list, make([]quota.Decision, 2)), quota.ErrMisconfigured)
	if n := charged(t, s, limit, "reset/b"); n != before {
		t.Errorf("a list whose reset fails: got %d charged, want none", n-before)
	}
}

// rightToAsk: while a slot is on its way the user of a cluster needs one right more.
func rightToAsk(t *testing.T, l library) {
	t.Parallel()
	c := redisserver.StartCluster(t)
	user := app(servers(c))
	list := append(rightsOn(t, l.name, true, user), infoRight)
	user.may(t, append(slices.Clone(list), movingRight)...)
	to := clustered(c)
	to.user, to.password = "app", secret
	s := l.dial(t, to)
	ok(t, use(s, "before"))
	slot := redisserver.Slot(stateOf("moving"))
	from, err := c.MasterFor(stateOf("moving"))
	ok(t, err)
	into := c.Nodes[0]
	if into == from {
		into = c.Nodes[1]
	}
	ok(t, c.BeginMove(slot, from, into))
	moving := quota.Charge{Limit: counted(plenty), Key: "moving", Cost: 1}
	take(t, s, moving) // redirected
	user.may(t, list...)
	if _, err := s.Charge(bg, moving); class(err) != quota.ErrMisconfigured && class(err) != quota.ErrUnavailable {
		t.Errorf("without %s: got error %v, want ErrMisconfigured or ErrUnavailable", movingRight, err)
	}
	user.may(t, append(slices.Clone(list), movingRight)...)
	if n := charged(t, s, moving.Limit, "moving"); n != 1 {
		t.Errorf("got %d charged, want 1", n)
	}
}

// wrongPassword changes passwords under a client. Errors name the fault and no secret.
func wrongPassword(t *testing.T, l library) {
	const key = "somebody-else"
	for _, c := range []struct {
		name, user   string
		text         []string // of which the error has one
		change, back []string
	}{
		{"user", "app", []string{"WRONGPASS"}, []string{"ACL", "SETUSER", "app", "resetpass", ">another"}, []string{"ACL", "SETUSER", "app", "resetpass", ">" + secret}},
		{"disabled user", "app", []string{"WRONGPASS"}, []string{"ACL", "SETUSER", "app", "off"}, []string{"ACL", "SETUSER", "app", "on"}},
		// go-redis goes on without a password, and the server takes so long a command from no unknown user.
		{"no password", "", []string{"NOAUTH", "unauthenticated"}, []string{"CONFIG", "SET", "requirepass", "another"}, []string{"CONFIG", "SET", "requirepass", ""}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			server := redisserver.StartConfig(t, redisserver.Config{Users: []string{"app on >" + secret + " ~* +@all"}})
			to := single(server)
			if to.user = c.user; c.user != "" {
				to.password = secret
			}
			s := l.dial(t, to)
			limit := counted(plenty)
			y := calls(s, limit, []string{key}, 20)
			do(t, server, c.change...)
			do(t, server, "CLIENT", "KILL", "TYPE", "normal")
			z := calls(s, limit, []string{key}, 60)
			t.Log(z)
			z.only(t, quota.ErrMisconfigured, quota.ErrIndeterminate) // of connections that were broken
			if z.failed[quota.ErrMisconfigured] == 0 {
				t.Errorf("ErrMisconfigured: got none in %v, want some", z)
			}
			for text := range z.texts {
				if strings.Contains(text, secret) || strings.Contains(text, key) {
					t.Errorf("got error %q, want neither password nor key in it", text)
				}
				if strings.Contains(text, "misconfigured") && !slices.ContainsFunc(c.text, func(s string) bool { return strings.Contains(text, s) }) {
					t.Errorf("got error %q, want one of %q in it", text, c.text)
				}
			}
			do(t, server, c.back...)
			until(t, "the client to recover", func() bool { return !s.fails(quota.Charge{Limit: limit, Key: key, Op: quota.OpPeek}) })
			y.exact(t, charged(t, s, limit, key))
		})
	}
}

// foreignKeys charges a key that its user may not touch, in a list with one that the user may.
func foreignKeys(t *testing.T, l library) {
	t.Parallel()
	server := redisserver.StartConfig(t, redisserver.Config{Users: []string{"app on >" + secret + " ~quota:{mine}* +@all"}})
	to := single(server)
	to.user, to.password = "app", secret
	s := l.dial(t, to)
	limit := counted(plenty)
	list := []quota.Charge{{Limit: limit, Key: "mine", Cost: 1}, {Limit: limit, Key: "hers", Cost: 1}}
	err := s.ChargeAll(bg, list, make([]quota.Decision, 2))
	if class(err) != quota.ErrMisconfigured || strings.Contains(err.Error(), "hers") {
		t.Errorf("a key without permission: got error %v, want ErrMisconfigured without the key", err)
	}
	if n := charged(t, s, limit, "mine"); n != 0 {
		t.Errorf("got %d charged, want none", n)
	}
}
