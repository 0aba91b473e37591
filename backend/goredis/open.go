package goredis

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/backend/internal/redisurl"
	"github.com/fleetquota/fleetquota/quota"
)

func init() { backend.Register("goredis", redisurl.Schemes, open) }

// open makes the store of a URL, and its client. It sends nothing, so it works while Redis is down; calls
// fail until Redis is up.
func open(_ context.Context, u *url.URL) (quota.Store, error) {
	c, err := redisurl.Parse(u)
	if err != nil {
		return nil, err
	}
	a := newAdapter()
	a.owned = true
	switch {
	case c.Cluster:
		a.nodes.surveyor = newSurveyor(c, &a.nodes.covered)
		o := clusterOptions(c)
		o.ClusterSlots, o.NewClient = a.nodes.surveyor.Slots, newNode
		a.cluster = redis.NewClusterClient(o)
		if c.Batching != engine.BatchNone {
			a.pipelines = newPipelines()
		}
	case c.Master != "":
		a.renew = func() *redis.Client {
			client := redis.NewFailoverClient(failoverOptions(c))
			client.AddHook(definite{c.MasterText})
			return client
		}
	default:
		a.renew = func() *redis.Client { return redis.NewClient(clientOptions(c)) }
	}
	if a.renew != nil {
		a.single.Store(a.renew())
		a.longest = c.LongestCall()
		if c.Batching == engine.BatchAuto || c.Batching == engine.BatchSlot {
			a.pipelines = newPipelines()
		}
	}
	s, err := engine.New(c.Guard(a), c.Cluster, engine.Options{Prefix: c.Prefix, Strict: c.Strict, Batching: c.Batching})
	if err != nil {
		a.Close()
		return nil, err
	}
	a.apart, c.Dialed, c.Closed = s.Apart, s.Dialed, s.Forget
	return &Store{engine: s, prompt: true}, nil
}

// The options below allow one attempt at connecting, and send only the credentials and the database on a new
// connection. The user needs rights to the scripts' commands only, and on a cluster to CLUSTER SLOTS.

func clientOptions(c *redisurl.Config) *redis.Options {
	return &redis.Options{
		Addr:                     c.Addrs[0],
		Dialer:                   dialer(c),
		Username:                 c.Username,
		Password:                 c.Password,
		DB:                       c.DB,
		TLSConfig:                c.TLS,
		Protocol:                 protocol(c),
		MaxRetries:               -1,
		DialTimeout:              c.DialTimeout,
		DialerRetries:            1,
		ReadTimeout:              c.Timeout,
		WriteTimeout:             c.Timeout,
		PoolTimeout:              c.Timeout,
		ContextTimeoutEnabled:    true,
		DisableIdentity:          true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	}
}

func failoverOptions(c *redisurl.Config) *redis.FailoverOptions {
	return &redis.FailoverOptions{
		MasterName:            c.Master,
		SentinelAddrs:         c.Addrs,
		SentinelUsername:      c.SentinelUsername,
		SentinelPassword:      c.SentinelPassword,
		Dialer:                dialer(c),
		Username:              c.Username,
		Password:              c.Password,
		DB:                    c.DB,
		TLSConfig:             c.TLS,
		Protocol:              protocol(c),
		MaxRetries:            -1,
		DialTimeout:           c.DialTimeout,
		DialerRetries:         1,
		ReadTimeout:           c.Timeout,
		WriteTimeout:          c.Timeout,
		PoolTimeout:           c.Timeout,
		ContextTimeoutEnabled: true,
		DisableIdentity:       true,
	}
}

func clusterOptions(c *redisurl.Config) *redis.ClusterOptions {
	return &redis.ClusterOptions{
		Addrs:                    c.Addrs,
		Dialer:                   dialer(c),
		Username:                 c.Username,
		Password:                 c.Password,
		TLSConfig:                c.TLS,
		Protocol:                 protocol(c),
		DialTimeout:              c.DialTimeout,
		DialerRetries:            1,
		ReadTimeout:              c.Timeout,
		WriteTimeout:             c.Timeout,
		PoolTimeout:              c.Timeout,
		ContextTimeoutEnabled:    true,
		DisableIdentity:          true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
		// The policies are for commands without keys, and the user would need a right to COMMAND.
		DisableRoutingPolicies: true,
	}
}

// protocol returns the version of RESP that the client asks for. Where the server refuses it, the client goes on
// with version 2.
func protocol(c *redisurl.Config) int {
	if c.RESP2 {
		return 2
	}
	return 3
}

func dialer(c *redisurl.Config) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, _, addr string) (net.Conn, error) {
		return c.Dial(ctx, &net.Dialer{}, addr)
	}
}

// definite is a hook that returns the error of a lookup of the master, at the sentinels, as an error of
// connecting: nothing was charged.
type definite struct{ master string } // the master's name for messages

func (d definite) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := next(ctx, network, addr)
		var answer redis.Error
		if errors.Is(err, redis.Nil) {
			return conn, unknownMaster(d.master)
		}
		// Of a sentinel's reply the class stays, if it has one that says 'not charged'.
		if err != nil && (!errors.As(err, &answer) || errors.Is(engine.ReplyError(answer), quota.ErrIndeterminate)) {
			err = redisurl.DialError("master "+d.master, reason{err})
		}
		return conn, err
	}
}

// unknownMaster is the error of a lookup that the sentinels answered with a null: they know no master of this name.
type unknownMaster string

func (m unknownMaster) Error() string {
	return fmt.Sprintf("the sentinels know no master %s; accepted: the name in their configuration", string(m))
}

// reason is the text of an error of connecting: the client must not take it for a reply to the script.
type reason struct{ err error }

func (r reason) Error() string { return r.err.Error() }

func (definite) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }

func (definite) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}
