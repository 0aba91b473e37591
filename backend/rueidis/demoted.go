package rueidis

import (
	"context"
	"sync"
	"time"

	"github.com/redis/rueidis"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
)

// rueidis keeps a connection to a server that was demoted: nothing in it looks at READONLY. So a client made from a URL
// is replaced by a new one, which resolves the address anew. Of a caller's client the connections are made to end, by
// QUIT, which needs no right.

// looks is how many commands are sent to meet each connection of a client to a server. The client gives no way to
// choose one: it sends a command with a key over a random one of, by default, at most four.
const looks = 32

// quitPatience bounds the wait for calls under way to end before connections do. A replica answers them at once.
const quitPatience = 250 * time.Millisecond

// leave ends the connections of a caller's client if they lead to a replica. Commands behind a QUIT are lost, so the
// store's own are held back meanwhile, and no QUIT is sent while all connections say that they lead to a primary.
func (a *adapter) leave() {
	key := *a.refused.Load()
	var mu sync.Mutex
	replica, known := false, false
	a.everywhere(key, func(answer rueidis.RedisResult) {
		is, ok := ofReplica(answer)
		mu.Lock()
		defer mu.Unlock()
		replica, known = replica || is, known || ok
	}, "HELLO")
	if replica || !known { // a server that does not know HELLO refused a script all the same
		a.pauses.during(quitPatience, func() { a.everywhere(key, func(rueidis.RedisResult) {}, "QUIT") })
	}
}

// everywhere sends a command over each connection, behind a command with a key.
func (a *adapter) everywhere(key string, read func(rueidis.RedisResult), command string) {
	engine.Each(looks, func(int) error {
		b := a.client.B()
		// Without a deadline: if the command has to dial, other calls wait for the same connection, and would
		// get the end of its context.
		answers := a.client.DoMulti(context.Background(), b.Get().Key(key).Build(), b.Arbitrary(command).Build())
		read(answers[1])
		return nil
	})
}

// ofReplica reports whether the server that answered HELLO is a replica; known is false if the answer does not tell.
func ofReplica(answer rueidis.RedisResult) (replica, known bool) {
	fields, err := answer.AsMap()
	if err != nil {
		return false, false
	}
	field := fields["role"]
	role, err := field.ToString()
	return role == "replica", err == nil
}

// renew makes a new client in the place of the one that leads to a replica.
func (l *lazy) renew() {
	old := l.made.Load()
	client, err := l.connect()
	if err != nil {
		return // the old client's next refusal asks again
	}
	a := l.adapt(client)
	ctx, cancel := context.WithTimeout(l.life, l.c.DialTimeout)
	defer cancel()
	a.Warm(ctx, "", *old.refused.Load()) // calls will tell an error
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		a.Close()
		return
	}
	l.made.Store(a)
	l.retired.Go(func() { l.retire(old) })
}

// retire closes a client once no call can be in flight.
func (l *lazy) retire(a *adapter) {
	wait := time.NewTimer(l.c.LongestCall())
	defer wait.Stop()
	select {
	case <-wait.C:
	case <-l.life.Done():
	}
	a.retired.Store(true)
	a.Close()
}

// adapt returns the adapter of a client that the store owns.
func (l *lazy) adapt(client rueidis.Client) *adapter {
	a := newAdapter(client)
	a.owned = true
	a.demoted = func(key string) {
		a.refused.Store(&key)
		if l.made.Load() == a {
			l.repair.Soon()
		}
	}
	return a
}
