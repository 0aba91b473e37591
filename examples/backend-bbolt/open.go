package bboltstore

import (
	"context"
	"fmt"
	"net/url"
	"time"

	"go.etcd.io/bbolt"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// With this package imported, backend.Open and REDIS_URL take bbolt:///path/of/file.db.
func init() { backend.Register("bboltstore", []string{"bbolt"}, open) }

// lockWait is the time that open waits for another process to close the file.
const lockWait = time.Second

func open(_ context.Context, u *url.URL) (quota.Store, error) {
	if u.User != nil || u.Host != "" || u.Path == "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("bboltstore: %w: the URL is not a path alone; accepted: bbolt:///path/of/file.db", quota.ErrInvalid)
	}
	db, err := bbolt.Open(u.Path, 0o600, &bbolt.Options{Timeout: lockWait})
	if err != nil {
		return nil, refused(err)
	}
	t, err := newTable(db, nil)
	if err != nil {
		db.Close()
		return nil, err
	}
	return driver.NewCAS(owner{t}, nil)
}

// owner is a table that owns its database. NewCAS finds the method Close, and the store's Close calls it.
type owner struct{ *table }

func (o owner) Close() error { return o.db.Close() }
