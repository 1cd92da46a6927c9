// The upstream suite of snapshotters as a client of a socket: go test -socket PATH.
package conformance

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

var socket = flag.String("socket", "", "the snapshot service's socket")

// scoped keeps the tests of the suite, which run at the same time and use the same names, apart from each other, as
// containerd does with its namespaces: every key gets a prefix of its own.
type scoped struct {
	snapshots.Snapshotter
	prefix string
}

var scopes atomic.Int64

func (s *scoped) in(key string) string {
	if key == "" {
		return ""
	}
	return s.prefix + key
}

func (s *scoped) out(info snapshots.Info) snapshots.Info {
	info.Name = strings.TrimPrefix(info.Name, s.prefix)
	info.Parent = strings.TrimPrefix(info.Parent, s.prefix)
	return info
}

func (s *scoped) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	info, err := s.Snapshotter.Stat(ctx, s.in(key))
	return s.out(info), err
}

func (s *scoped) Update(ctx context.Context, info snapshots.Info, paths ...string) (snapshots.Info, error) {
	info.Name = s.in(info.Name)
	info.Parent = s.in(info.Parent)
	updated, err := s.Snapshotter.Update(ctx, info, paths...)
	return s.out(updated), err
}

func (s *scoped) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	return s.Snapshotter.Usage(ctx, s.in(key))
}

func (s *scoped) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	return s.Snapshotter.Mounts(ctx, s.in(key))
}

func (s *scoped) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.Snapshotter.Prepare(ctx, s.in(key), s.in(parent), opts...)
}

func (s *scoped) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.Snapshotter.View(ctx, s.in(key), s.in(parent), opts...)
}

func (s *scoped) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	return s.Snapshotter.Commit(ctx, s.in(name), s.in(key), opts...)
}

func (s *scoped) Remove(ctx context.Context, key string) error {
	return s.Snapshotter.Remove(ctx, s.in(key))
}

func (s *scoped) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	scopedFilters := make([]string, len(filters))
	for i, filter := range filters {
		for _, field := range []string{"name==", "parent=="} {
			filter = strings.ReplaceAll(filter, field, field+s.prefix)
		}
		scopedFilters[i] = filter
	}
	return s.Snapshotter.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
		if !strings.HasPrefix(info.Name, s.prefix) {
			return nil
		}
		return fn(ctx, s.out(info))
	}, scopedFilters...)
}

func TestSuite(t *testing.T) {
	if *socket == "" {
		t.Fatal("give -socket PATH")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	connection, err := grpc.DialContext(ctx, "unix://"+*socket, grpc.WithBlock(),
		grpc.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	client := snapshotsapi.NewSnapshotsClient(connection)
	testsuite.SnapshotterSuite(t, "flatmount", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		own := &scoped{proxy.NewSnapshotter(client, "flatmount"), fmt.Sprintf("suite%d/", scopes.Add(1))}
		return own, own.Close, nil
	})
}
